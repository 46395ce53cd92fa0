"""Products with weights of 2 to 8 bits on a grid or in a table, in plain PyTorch: what a kernel has to compute.

The planes stay packed on the device. A product dequantizes some output channels at a time, so that no whole weight in
16 bits ever exists. Nothing in :meth:`LowBitLinear.apply` depends on values, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant_methods.formats.grid import expand
from quant_methods.formats.native_format import PLANES, pack_codes, unpack_codes

ROWS_AT_ONCE = 1024
"""Output channels dequantized at a time."""


class LowBitLinear(nn.Module):
    """A layer's bulk.

    Args:
        codes: int8 [out, in]: signed codes of a grid, or a table's indices; 32 divides ``in``.
        scale: [out, groups], or [out, 0] with a table.
        zero_point: int8 [out, groups] in the numbering of ``codes``; None or zeros for none.
        table: [out, 2^bits], or None for a grid.
        dtype: 16-bit dtype of the arithmetic: a weight is rounded to it once.

    """

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        if table is not None:
            self.bits = table.shape[1].bit_length() - 1
            unsigned = codes
        else:
            extent = max(int(codes.max()) + 1, -int(codes.min()))
            self.bits = max(2, (extent - 1).bit_length() + 1)
            unsigned = codes.int() + (1 << (self.bits - 1))
        for width, words in pack_codes(unsigned, self.bits).items():
            self.register_buffer(f"plane{width}", words, persistent=False)
        self.register_buffer("scale", scale if table is None else None, persistent=False)
        self.register_buffer("table", table, persistent=False)
        offset = None
        if table is None:
            # What an unsigned code minus this is, times the scale, is the weight.
            offset = torch.full(scale.shape, 1 << (self.bits - 1), dtype=torch.int16, device=codes.device)
            offset = offset if zero_point is None else offset + zero_point
        self.register_buffer("offset", offset, persistent=False)

    def weight(self, start: int, stop: int) -> Tensor:
        """Return some output channels' weights [stop - start, in], dequantized."""
        codes = unpack_codes({w: getattr(self, f"plane{w}")[start:stop] for w in PLANES[self.bits]}, self.bits)
        if self.table is not None:
            return self.table[start:stop].gather(1, codes.long()).to(self.dtype)
        inputs = codes.shape[1]
        shifted = codes.float() - expand(self.offset[start:stop].float(), inputs)
        return (shifted * expand(self.scale[start:stop].float(), inputs)).to(self.dtype)

    def apply(self, x: Tensor) -> Tensor:
        """Return the product [..., out] with inputs [..., in], both in ``dtype``."""
        rows = getattr(self, f"plane{PLANES[self.bits][0]}").shape[0]
        parts = [
            functional.linear(x, self.weight(start, min(start + ROWS_AT_ONCE, rows)))
            for start in range(0, rows, ROWS_AT_ONCE)
        ]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
