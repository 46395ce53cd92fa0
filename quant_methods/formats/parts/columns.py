"""Input channels kept apart in more bits than the bulk, which counts as zero there (LLM.int8's outliers).

Stored as ``column_index`` int32 [k], rising, and ``column_weight`` [rows, k] in 16 bits, or in int8 with
``column_scale`` [rows].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.part import (
    Addition,
    Bulk,
    Draw,
    Part,
    PartForm,
    Range,
    Shapes,
    Stored,
    expect_one_of,
)

if TYPE_CHECKING:
    from quant_methods.formats.quantized import QuantizedLinear


@dataclass
class Columns(Addition):
    """Input channels kept apart.

    Attributes:
        index: int32 [k], the channels, rising. Layers that share an input share their channels.
        weight: [out, k] in the model's 16-bit dtype, or int8 codes.
        scale: [out] in the model's dtype if ``weight`` holds codes, else None.

    """

    kind: ClassVar[str] = "columns"
    what: ClassVar[str] = "columns"
    learns: ClassVar[tuple[str, ...]] = ("weight", "scale")

    index: Tensor
    weight: Tensor
    scale: Tensor | None = None

    def read(self) -> Tensor:
        """Return the float32 weights [out, k]."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale.float()[:, None]

    def add(self, weight: Tensor) -> None:
        """Add the channels to a weight; see :class:`Addition`."""
        weight[:, self.index.long()] += self.read()

    def apart(self) -> Tensor | None:
        """Return the channels; see :class:`Addition`."""
        return self.index.long()

    def times(self, factors: Tensor) -> Columns:
        """Return the part of a weight with other output channels; columns in 16 bits have no scale."""
        if self.scale is not None:
            return super().times(factors)
        weight = self.weight.float() * factors.to(self.weight.device)[:, None]
        return dataclasses.replace(self, weight=weight.to(self.weight.dtype))

    def take_over(self, bulk: Bulk) -> tuple[Bulk, Columns]:
        """Take off again what the bulk's codes mean in the channels, where none means zero."""
        bulk, left = bulk.without(self.index.long())
        return bulk, self if left is None else Columns(self.index, self.read() - left)

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        if not len(self.index):
            return {}
        tensors = {"column_index": self.index.int(), "column_weight": self.weight}
        return tensors if self.scale is None else tensors | {"column_scale": self.scale}

    def cut(self, rows: Range, inputs: Range) -> Columns:
        """Return the channels that lie in a range, maybe none."""
        left, right = inputs
        inside = (self.index >= left) & (self.index < right)
        scale = None if self.scale is None else self.scale[slice(*rows)]
        return Columns(self.index[inside] - left, self.weight[slice(*rows)][:, inside], scale)

    @classmethod
    def stack(cls, layers: Sequence[QuantizedLinear]) -> Columns:
        """Return the channels of layers on top of each other: what some keep apart and others do not, all do."""
        parts = [part for layer in layers if (part := layer.get(cls)) is not None]
        first = parts[0]
        alike = len(parts) == len(layers) and all(
            torch.equal(part.index, first.index) and (part.scale is None) == (first.scale is None) for part in parts
        )
        if alike:
            scales = [part.scale for part in parts if part.scale is not None]
            return cls(first.index, torch.cat([part.weight for part in parts]), torch.cat(scales) if scales else None)
        index = torch.cat([part.index for part in parts]).unique()
        dtype = first.weight.dtype if first.scale is None else first.scale.dtype
        weights = []
        for layer in layers:
            weight = layer.read_bulk()
            if (part := layer.get(cls)) is not None:
                part.add(weight)
            weights.append(weight[:, index.long()].to(dtype))
        return cls(index, torch.cat(weights))


@dataclass(frozen=True)
class ColumnsForm(PartForm):
    """How channels kept apart are stored.

    Attributes:
        count: of the channels.
        bits: of a weight there: 16 or 8.

    """

    part: ClassVar[type[Part]] = Columns

    count: int
    bits: int = 16

    def check(self, where: str) -> None:
        """Refuse other bits, and a number that is none."""
        super().check(where)
        expect_one_of(where, "bits", self.bits, (8, 16))
        if self.count < 1:
            raise ParetoError(f"{where}: count is {self.count}, expected a positive number")

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name."""
        found = {
            "column_index": Stored((self.count,), torch.int32),
            "column_weight": Stored((rows, self.count), torch.int8 if self.bits == 8 else None),
        }
        return found | {"column_scale": Stored((rows,))} if self.bits == 8 else found

    @classmethod
    def found(cls, shapes: Shapes) -> ColumnsForm | None:
        """Return the form of channels that have an index."""
        if "column_index" not in shapes:
            return None
        return cls(shapes["column_index"][0], 8 if "column_scale" in shapes else 16)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Columns:
        """Return the channels; see :class:`PartForm`."""
        return Columns(tensors["column_index"], tensors["column_weight"], tensors.get("column_scale"))

    def random(self, rows: int, inputs: int, draw: Draw) -> Columns:
        """Return channels evenly spread; see :class:`PartForm`."""
        index = draw.channels(self.count, inputs)
        if self.bits == 8:
            return Columns(index, draw.integers(-128, 128, rows, self.count), draw.uniform(rows) / 128)
        return Columns(index, draw.uniform(rows, self.count))
