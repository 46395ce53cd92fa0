"""A part that no format has: what adding one takes is this file and an entry in the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quant_methods.formats.parts.part import Addition, Draw, Part, PartForm, Range, Shapes, Stored
from quant_methods.formats.quantized import QuantizedLinear


@dataclass
class Offsets(Addition):
    """A number that is added to all weights of an output channel, [out]."""

    kind: ClassVar[str] = "offsets"
    what: ClassVar[str] = "offsets of rows"
    learns: ClassVar[tuple[str, ...]] = ("values",)
    of_rows: ClassVar[str] = "values"

    values: Tensor

    def add(self, weight: Tensor) -> None:
        weight += self.values.float()[:, None]

    def pack(self) -> dict[str, Tensor]:
        return {"offset_values": self.values}

    def cut(self, rows: Range, inputs: Range) -> Offsets:
        return Offsets(self.values[slice(*rows)])

    @classmethod
    def stack(cls, layers: Sequence[QuantizedLinear]) -> Offsets:
        dtype = next(part.values.dtype for layer in layers if (part := layer.get(cls)) is not None)
        found = [(layer.shape[0], layer.get(cls)) for layer in layers]
        return cls(torch.cat([torch.zeros(n, dtype=dtype) if part is None else part.values for n, part in found]))


@dataclass(frozen=True)
class OffsetsForm(PartForm):
    part: ClassVar[type[Part]] = Offsets

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        return {"offset_values": Stored((rows,))}

    @classmethod
    def found(cls, shapes: Shapes) -> OffsetsForm | None:
        return cls() if "offset_values" in shapes else None

    def unpack(self, tensors: Mapping[str, Tensor]) -> Offsets:
        return Offsets(tensors["offset_values"])

    def random(self, rows: int, inputs: int, draw: Draw) -> Offsets:
        return Offsets(draw.uniform(rows))


class AddOffsets(nn.Module):
    """What a kernel of this part would be."""

    def __init__(self, parts: Sequence[Addition], dtype: torch.dtype) -> None:
        super().__init__()
        (part,) = parts
        assert isinstance(part, Offsets)
        self.register_buffer("values", part.values.to(dtype), persistent=False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + x.float().sum(-1, keepdim=True).to(y.dtype) * self.values

    def prepare(self, width: int, product: object = None) -> None:
        pass
