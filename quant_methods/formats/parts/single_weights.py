"""Single weights that are added to the bulk, in compressed rows (SqueezeLLM's sparse part).

Stored as ``sparse_starts`` int32 [rows + 1], ``sparse_columns`` int32 [n] and ``sparse_values`` [n] in 16 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from quant_methods.formats.parts.part import Addition, Draw, Part, PartForm, Range, Shapes, Stored

if TYPE_CHECKING:
    from quant_methods.formats.quantized import QuantizedLinear

RANDOM_SHARE = 0.005
"""Of weights that are stored singly in a random layer (Kim et al., SqueezeLLM, 2023, section 4.2, keep 0.45%)."""


@dataclass
class Sparse(Addition):
    """Single weights.

    Attributes:
        starts: int32 [out + 1], where each output channel's begin.
        columns: int32 [n], their input channels, rising within a row.
        values: [n] in the model's 16-bit dtype.

    """

    kind: ClassVar[str] = "sparse"
    what: ClassVar[str] = "sparse weights"
    learns: ClassVar[tuple[str, ...]] = ("values",)

    starts: Tensor
    columns: Tensor
    values: Tensor

    def rows(self) -> Tensor:
        """Return each value's output channel, int64 [n]."""
        counts = self.starts.diff().long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def add(self, weight: Tensor) -> None:
        """Add the values to a weight; see :class:`Addition`."""
        weight.index_put_((self.rows(), self.columns.long()), self.values.float(), accumulate=True)

    def times(self, factors: Tensor) -> Sparse:
        """Return the part of a weight with other output channels."""
        values = self.values.float() * factors.to(self.values.device)[self.rows()]
        return dataclasses.replace(self, values=values.to(self.values.dtype))

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        if not len(self.values):
            return {}
        starts, columns = self.starts.int(), self.columns.int()
        return {"sparse_starts": starts, "sparse_columns": columns, "sparse_values": self.values}

    def cut(self, rows: Range, inputs: Range) -> Sparse:
        """Return the values that lie in a range, maybe none."""
        (top, bottom), (left, right) = rows, inputs
        row = self.rows()
        inside = (row >= top) & (row < bottom) & (self.columns >= left) & (self.columns < right)
        return Sparse(_starts(row[inside] - top, bottom - top), self.columns[inside] - left, self.values[inside])

    @classmethod
    def stack(cls, layers: Sequence[QuantizedLinear]) -> Sparse:
        """Return the values of layers on top of each other; some may have none."""
        rows, parts, first = [], [], 0
        for layer in layers:
            if (part := layer.get(cls)) is not None:
                parts.append(part)
                rows.append(part.rows() + first)
            first += layer.shape[0]
        columns, values = ([getattr(part, name) for part in parts] for name in ("columns", "values"))
        return cls(_starts(torch.cat(rows), first), torch.cat(columns), torch.cat(values))


def _starts(rows: Tensor, count: int) -> Tensor:
    """Return where each of ``count`` rows begins, int32 [count + 1], from the rows of the values."""
    counts = torch.bincount(rows, minlength=count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


@dataclass(frozen=True)
class SparseForm(PartForm):
    """How single weights are stored; how many there are, only their tensors say."""

    part: ClassVar[type[Part]] = Sparse

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name."""
        return {
            "sparse_starts": Stored((rows + 1,), torch.int32),
            "sparse_columns": Stored((-1,), torch.int32),
            "sparse_values": Stored((-1,)),
        }

    @classmethod
    def found(cls, shapes: Shapes) -> SparseForm | None:
        """Return the form of weights whose rows begin somewhere."""
        return cls() if "sparse_starts" in shapes else None

    def unpack(self, tensors: Mapping[str, Tensor]) -> Sparse:
        """Return the weights; see :class:`PartForm`."""
        return Sparse(tensors["sparse_starts"], tensors["sparse_columns"], tensors["sparse_values"])

    def random(self, rows: int, inputs: int, draw: Draw) -> Sparse:
        """Return as many weights in each row, evenly spread; see :class:`PartForm`."""
        each = max(round(inputs * RANDOM_SHARE), 1)
        starts = torch.arange(rows + 1, device=draw.device, dtype=torch.int32) * each
        return Sparse(starts, draw.channels(each, inputs).repeat(rows), draw.uniform(rows * each))
