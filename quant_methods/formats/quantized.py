"""What a weight step makes of a linear layer: codes, how they read back, and what is kept beside them.

A layer's weight is the sum of up to four parts, each of which a step may leave out::

    W = bulk + columns + sparse + up @ down

The bulk is integer codes on a grid (``grid.py``) or indices into a look-up table of each output channel (SqueezeLLM);
columns are input channels kept apart in more bits (LLM.int8's outliers), where the bulk counts as zero; sparse holds
single weights that are added (SqueezeLLM's sparse part); up @ down makes up for the error (ZeroQuant-V2's low-rank
compensation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_methods.formats.grid import dequantize


@dataclass
class Columns:
    """Input channels kept in more bits than the bulk.

    Attributes:
        index: int32 [k], the channels, rising. Layers that share an input share their channels.
        weight: [out, k] in the model's 16-bit dtype, or int8 codes.
        scale: [out] in the model's dtype if ``weight`` holds codes, else None.

    """

    index: Tensor
    weight: Tensor
    scale: Tensor | None = None

    def read(self) -> Tensor:
        """Return the float32 weights [out, k]."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale.float()[:, None]


@dataclass
class Sparse:
    """Single weights added to the bulk, in compressed rows.

    Attributes:
        starts: int32 [out + 1], where each output channel's begin.
        columns: int32 [n], their input channels, rising within a row.
        values: [n] in the model's 16-bit dtype.

    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    def rows(self) -> Tensor:
        """Return each value's output channel, int64 [n]."""
        counts = self.starts.diff().long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


@dataclass
class LowRank:
    """A product added to the bulk.

    Attributes:
        up: [out, rank] in the model's 16-bit dtype.
        down: [rank, in], likewise.

    """

    up: Tensor
    down: Tensor


@dataclass
class QuantizedLinear:
    """A quantized linear layer.

    Attributes:
        codes: int8 [out, in]: on a grid signed codes; with a table its indices, from 0.
        scale: [out, groups] in the stored dtype (unused with a table: [out, 0]).
        zero_point: int8 [out, groups]; zeros on a symmetric grid.
        table: [out, 2^bits] in the stored dtype, what each index of an output channel means; None: a grid.
        columns: input channels kept apart; the codes there mean nothing.
        sparse: single weights to add.
        low_rank: a product to add.
        input_scale: float32 [1], of activations that are rounded to 8 bits with a fixed scale.

    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    table: Tensor | None = None
    columns: Columns | None = None
    sparse: Sparse | None = None
    low_rank: LowRank | None = None
    input_scale: Tensor | None = None

    @property
    def beside(self) -> bool:
        """Whether there is anything beside the bulk."""
        return any(part is not None for part in (self.columns, self.sparse, self.low_rank))

    def bulk(self) -> Tensor:
        """Return the float32 weight [out, in] of the codes alone."""
        if self.table is not None:
            weight = self.table.float().gather(1, self.codes.long())
        else:
            weight = dequantize(self.codes, self.scale, self.zero_point)
        if self.columns is not None:
            weight[:, self.columns.index.long()] = 0
        return weight

    def read(self) -> Tensor:
        """Return the float32 weight [out, in] that serving means."""
        weight = self.bulk()
        if self.columns is not None:
            weight[:, self.columns.index.long()] = self.columns.read()
        if self.sparse is not None:
            at = (self.sparse.rows(), self.sparse.columns.long())
            weight.index_put_(at, self.sparse.values.float(), accumulate=True)
        if self.low_rank is not None:
            weight += self.low_rank.up.float() @ self.low_rank.down.float()
        return weight

    def cpu(self) -> QuantizedLinear:
        """Return a copy on the CPU."""
        return self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> QuantizedLinear:
        """Return a copy on a device."""

        def moved(part: object) -> object:
            if isinstance(part, Tensor):
                return part.to(device)
            return None if part is None else type(part)(*map(moved, vars(part).values()))

        return QuantizedLinear(*map(moved, vars(self).values()))  # type: ignore[arg-type]
