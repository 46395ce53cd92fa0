"""Products with weights of 2 to 7 bits on a CUDA device, and with what lies beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kv_cache.doors import expect
from kv_cache.errors import ParetoError
from quant_methods.formats.parts.bitmap_codes import BitmapCodes
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.semi_sparse import SemiSparseCodes
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.parts.trellis_codes import TrellisCodes
from quant_methods.kernels.beside import Beside, BesideParts, add_beside_in_torch, add_to_weight
from quant_methods.kernels.beside_cuda import add_on_cuda
from quant_methods.kernels.low_bit import LowBitLinear
from quant_methods.kernels.low_bit_layout import (
    CHANNELS,
    ROWS,
    by_group,
    pack,
    pack_bitmap,
    pack_semi_sparse,
    pack_trellis,
)
from quant_methods.kernels.low_bit_matrix import MAX_TOKENS, PackedMatrix

GROUPS = (32, 64, 128)
"""Channels of a group."""
MAX_LAUNCHES = 2
"""Of a product; with more tokens than these take, the weights are expanded for a dense product."""
EXPANDED_BYTES = 256 << 20
"""Of weights that are expanded at once."""


WIDTHS = {"grid": range(2, 8), "table": (3, 4), "trellis": (2, 3, 4), "semi_sparse": (4,), "bitmap": (4,)}
"""Bits of a code that the kernel serves, by kind of bulk."""
SEMI_SPARSE_BITS = 3
"""That a weight takes of 2:4 codes: two of 4 bits and a nibble of places for four."""

LowBitPart = GridCodes | TableCodes | TrellisCodes | SemiSparseCodes | BitmapCodes


class _NotServedError(ParetoError):
    """The kernel is not for such weights."""


class LowBitCUDA(nn.Module):
    """A layer's bulk on a CUDA device; its specification is :class:`quant_methods.kernels.low_bit.LowBitLinear`.

    Args:
        part: codes of 2 to 7 bits on a grid, 2 to 4 bits of a trellis, or 4 bits, 2:4 or with a bitmap, with a scale
            of a row or of groups of which 32 divides the channels, or codes of 3 or 4 bits with tables; 8 divides the
            input channels.
        dtype: bfloat16 or float16, of activations and results.

    Raises:
        ParetoError: a shape or dtype that the kernel does not serve.

    """

    def __init__(self, part: LowBitPart, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.bits, self.dtype, (self.rows, self.channels) = part.kind, part.bits, dtype, part.shape
        if self.bits not in WIDTHS[self.kind] or dtype not in (torch.bfloat16, torch.float16) or self.channels % 8:
            widths = WIDTHS[self.kind]
            what = f"{part.what} of {' to '.join(dict.fromkeys(map(str, (widths[0], widths[-1]))))} bits"
            raise _NotServedError(f"the low-bit kernel serves {what}, 16-bit activations and channels in eights")
        self.units, self.tiles, self.group_steps = -(-self.channels // CHANNELS), -(-self.rows // ROWS), CHANNELS // 16
        kept = starts = None
        self.most_lines = 0
        if isinstance(part, TrellisCodes):
            expect(
                "the low-bit kernel",
                (
                    (part.words.dtype == torch.int32 and len(part.words) == self.tiles, f"{self.tiles} tiles of words"),
                    (part.words.shape[2] == 8 * self.bits, "tiles of as many words as 8 weights have bits"),
                    (part.scale.device == part.words.device, "words and scales on one device"),
                ),
            )
            words = pack_trellis(part.words)
            side = self._groups(part.scale.to(dtype))
        elif isinstance(part, GridCodes | SemiSparseCodes):
            half = 1 << (self.bits - 1)
            unsigned = (part.codes.to(torch.int16) + half).to(torch.uint8)
            if isinstance(part, SemiSparseCodes):
                self.bits = SEMI_SPARSE_BITS
                words = pack_semi_sparse(unsigned, part.places)
            else:
                words = pack(unsigned, self.bits)
            side = self._scales(part.scale, part.zero_point, half)
        elif isinstance(part, BitmapCodes):
            blocks = self.tiles * self.units
            expect(
                "the low-bit kernel",
                (
                    (part.bitmap.dtype == torch.int32, "a bitmap in int32"),
                    (len(part.bitmap) == self.tiles, f"{self.tiles} tiles of a bitmap"),
                    (part.kept.dtype == part.starts.dtype == torch.int32, "codes and their starts in int32"),
                    (len(part.starts) == blocks + 1, f"{blocks + 1} starts of codes"),
                    (part.scale.device == part.bitmap.device, "bitmap and scales on one device"),
                ),
            )
            words = pack_bitmap(part.bitmap)
            side = self._scales(part.scale, part.zero_point, 1 << (part.bits - 1))
            # The kernel may read two words more than there are codes.
            kept, starts = functional.pad(part.kept, (0, 0, 0, 1)), part.starts.contiguous()
            self.most_lines = int(starts.diff().max())
        else:
            words = pack(part.codes.to(torch.uint8), self.bits, table=True)
            padded = torch.zeros(self.tiles * ROWS, 1 << self.bits, dtype=dtype, device=part.device)
            padded[: self.rows] = part.table
            # Axes: tile, row g, row r, low bytes and high bytes, entry.
            both = padded.view(torch.uint8).unflatten(1, (-1, 2)).transpose(1, 2)
            side = both.unflatten(0, (self.tiles, 4, 8)).transpose(1, 2).contiguous()
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("side", side, persistent=False)
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("starts", starts, persistent=False)

    def _scales(self, scale: Tensor, zero_point: Tensor, half: int) -> Tensor:
        """Return the groups' scales and, beside them, what a code's 16-bit float is above its weight without scale."""
        magic = (128 if self.dtype == torch.bfloat16 else 1024) + half
        offset = -magic - zero_point.float()
        return self._groups(torch.stack([scale.to(self.dtype), offset.to(self.dtype)], 2))

    def _groups(self, values: Tensor) -> Tensor:
        """Return what the groups [rows, groups, ...] have, laid out; wider ones become several of the same values."""
        groups = values.shape[1]
        width = self.channels // groups
        if groups == 1:  # One scale for the whole row: every unit has it.
            groups, width = self.units, CHANNELS
            values = values.expand(-1, groups, *values.shape[2:])
        served = next((size for size in reversed(GROUPS) if width % size == 0), None)
        if served is None or width * groups < self.channels:
            raise _NotServedError(f"the low-bit kernel serves groups of which 32 divides the channels, not of {width}")
        self.group_steps = served // 16
        return by_group(values.repeat_interleave(width // served, 1), served, self.kind == "trellis")

    def apply(self, x: Tensor, beside: Beside | None = None) -> Tensor:
        """Return the product [..., out] with inputs [..., in], both in ``dtype``, of the bulk and what lies beside."""
        x, shape = x.reshape(-1, self.channels), x.shape[:-1]
        parts = list(BesideParts() if beside is None else beside.parts(x))
        codes = [] if self.kept is None else [self.kept, self.starts]
        y = low_bit_linear(
            x, self.words, self.side, codes, self.kind, parts, self.rows, self.bits, self.group_steps, self.most_lines
        )
        return y.reshape(*shape, self.rows)

    def weight(self) -> Tensor:
        """Return the weight [out, in] in ``dtype``."""
        return self.matrix().expand(self.dtype, 0, self.tiles)

    def prepare(self) -> None:
        """See :meth:`quant_methods.kernels.low_bit_matrix.PackedMatrix.prepare`."""
        self.matrix().prepare(self.dtype)

    def matrix(self) -> PackedMatrix:
        """Return what the kernels are launched on."""
        return PackedMatrix(
            self.words,
            self.side,
            self.kind,
            self.rows,
            self.channels,
            self.bits,
            self.group_steps,
            self.kept,
            self.starts,
            self.most_lines,
        )


def low_bit_module(part: LowBitPart, dtype: torch.dtype) -> LowBitCUDA | LowBitLinear:
    """Return what multiplies by a layer's bulk on a CUDA device: the kernel where it serves it, else PyTorch.

    Takes the arguments of :class:`LowBitCUDA`, and tables of 2 bits besides: to the kernel these are tables of 3 bits
    of which the codes use the first half.
    """
    padded = part
    if isinstance(part, TableCodes) and part.bits == 2:
        padded = TableCodes(part.codes, functional.pad(part.table, (0, 4)))
    try:
        return LowBitCUDA(padded, dtype)
    except _NotServedError:
        return LowBitLinear(part, dtype)


@torch.library.custom_op("pareto::low_bit_linear", mutates_args=())
def low_bit_linear(
    x: Tensor,
    words: Tensor,
    side: Tensor,
    codes: list[Tensor],
    kind: str,
    beside: list[Tensor | None],
    rows: int,
    bits: int,
    group_steps: int,
    most_lines: int,
) -> Tensor:
    """Return x W^T and what lies beside, by the kernels or, with many rows of x, by a dense product.

    One operator, since the kernel that adds what lies beside may start before the bulk's has ended if it is the next.

    Args:
        x: [tokens, in] bfloat16 or float16.
        words: as ``pack``, ``pack_trellis``, ``pack_semi_sparse`` or ``pack_bitmap`` returns them.
        side: as :class:`LowBitCUDA` lays them out, scales (and offsets) in the dtype of x, or bytes of the tables.
        codes: with a bitmap, the lines of codes, int32 [lines + 1, 4], and where each unit's begin, int32 [units + 1];
            else none.
        kind: of the bulk, as in ``WIDTHS``.
        beside: what lies beside, the fields of :class:`quant_methods.kernels.beside.BesideParts`.
        rows: output channels.
        bits: of a weight in ``words``.
        group_steps: channels of a group, in sixteens.
        most_lines: that a unit's codes have.

    Returns:
        [tokens, rows] in the dtype of x.

    """
    kept, starts = codes or (None, None)
    matrix = PackedMatrix(words, side, kind, rows, x.shape[1], bits, group_steps, kept, starts, most_lines)
    parts = BesideParts(*beside)
    if x.shape[0] > MAX_LAUNCHES * MAX_TOKENS:
        return _dense(matrix, x, parts)
    y = x.new_empty(x.shape[0], rows)
    for first in range(0, x.shape[0], MAX_TOKENS):
        some = slice(first, first + MAX_TOKENS)
        _few(matrix, x[some], y[some], parts if parts.low is None else parts._replace(low=parts.low[some]))
    return y


def _few(matrix: PackedMatrix, x: Tensor, y: Tensor, beside: BesideParts) -> None:
    """Write the product of as many tokens as a launch takes to y."""
    if y.is_cuda:
        add_on_cuda(y, x, beside, bulk=lambda: matrix.multiply(x, y))
    else:
        matrix.multiply(x, y)
        y.copy_(add_beside_in_torch(y, x, beside))


def _dense(matrix: PackedMatrix, x: Tensor, beside: BesideParts) -> Tensor:
    """Return the product with the weight expanded, and with single weights and channels kept apart added to it."""
    y = x.new_empty(x.shape[0], matrix.rows)
    at_once = max(EXPANDED_BYTES // (2 * x.shape[1] * ROWS), 1)
    for first in range(0, matrix.tiles, at_once):
        weight = matrix.expand(x.dtype, first, min(first + at_once, matrix.tiles))
        add_to_weight(weight, first * ROWS, beside)
        torch.mm(x, weight.T, out=y[:, first * ROWS : first * ROWS + len(weight)])
    return y if beside.low is None else y.addmm_(beside.low, beside.low_rank())


@low_bit_linear.register_fake
def _(
    x: Tensor,
    words: Tensor,
    side: Tensor,
    codes: list[Tensor],
    kind: str,
    beside: list[Tensor | None],
    rows: int,
    bits: int,
    group_steps: int,
    most_lines: int,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)
