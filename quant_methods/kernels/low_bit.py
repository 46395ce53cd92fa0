"""Products with weights of 2 to 8 bits in plain PyTorch, whatever the bulk: a kernel has to agree.

The codes stay packed on the device. A product dequantizes some output channels at a time, so that no whole weight in
16 bits ever exists. Nothing in :meth:`LowBitLinear.apply` depends on values, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant_methods.formats.grid import expand
from quant_methods.formats.parts.bitmap_codes import BitmapCodes
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.planes import PLANES, pack_codes, unpack_codes
from quant_methods.formats.parts.semi_sparse import SemiSparseCodes, unpacked
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.parts.trellis import TILE_ROWS
from quant_methods.formats.parts.trellis_codes import TrellisCodes

ROWS_AT_ONCE = 1024
"""Output channels dequantized at a time; whole tiles of a trellis code, and of a bitmap."""


class LowBitLinear(nn.Module):
    """A layer's bulk.

    Args:
        part: codes on a grid, with tables or 2:4 ones, of which 32 divides the input channels, of a trellis, or with a
            bitmap, which become codes on a grid.
        dtype: 16-bit dtype of the arithmetic: a weight is rounded to it once.

    """

    def __init__(
        self, part: GridCodes | TableCodes | TrellisCodes | SemiSparseCodes | BitmapCodes, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype, self.bits, self.rows = dtype, part.bits, part.shape[0]
        streams = scale = table = offset = None
        self.stored: tuple[str, ...] = ()
        if isinstance(part, BitmapCodes):
            part = part.grid()
        if isinstance(part, SemiSparseCodes):
            for name, tensor in part.pack().items():
                self.register_buffer(name, tensor, persistent=False)
                self.stored += (name,)
        elif isinstance(part, TrellisCodes):
            streams, scale = part.words, part.scale
        elif isinstance(part, TableCodes):
            self._pack(part.codes.int())
            table = part.table
        else:
            half, scale = 1 << (self.bits - 1), part.scale
            self._pack(part.codes.int() + half)
            # What an unsigned code minus this is, times the scale, is the weight.
            offset = half + part.zero_point.to(torch.int16)
        self.register_buffer("streams", streams, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def _pack(self, unsigned: Tensor) -> None:
        for width, words in pack_codes(unsigned, self.bits).items():
            self.register_buffer(f"plane{width}", words, persistent=False)

    def weight(self, start: int, stop: int) -> Tensor:
        """Return some output channels' weights [stop - start, in], dequantized; see ``ROWS_AT_ONCE``."""
        if self.stored:
            tensors = {name: getattr(self, name)[start:stop] for name in self.stored}
            return unpacked(tensors, self.bits, "weight_zero_point" not in tensors).read().to(self.dtype)
        if self.streams is not None:
            words = self.streams[start // TILE_ROWS : -(-stop // TILE_ROWS)]
            return TrellisCodes(words, self.scale[start:stop]).read().to(self.dtype)
        codes = unpack_codes({w: getattr(self, f"plane{w}")[start:stop] for w in PLANES[self.bits]}, self.bits)
        if self.table is not None:
            return self.table[start:stop].gather(1, codes.long()).to(self.dtype)
        inputs = codes.shape[1]
        shifted = codes.float() - expand(self.offset[start:stop].float(), inputs)
        return (shifted * expand(self.scale[start:stop].float(), inputs)).to(self.dtype)

    def apply(self, x: Tensor) -> Tensor:
        """Return the product [..., out] with inputs [..., in], both in ``dtype``."""
        parts = [
            functional.linear(x, self.weight(start, min(start + ROWS_AT_ONCE, self.rows)))
            for start in range(0, self.rows, ROWS_AT_ONCE)
        ]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
