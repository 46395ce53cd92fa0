"""Products with weights of 2 to 7 bits on a CUDA device, and with what lies beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.parts.trellis_codes import TrellisCodes
from quant_methods.kernels.beside import Beside, BesideParts, add_beside_in_torch, add_to_weight
from quant_methods.kernels.beside_cuda import add_on_cuda
from quant_methods.kernels.low_bit import LowBitLinear
from quant_methods.kernels.low_bit_layout import CHANNELS, ROWS, pack, pack_trellis
from quant_methods.kernels.low_bit_matrix import MAX_TOKENS, PackedMatrix

GROUPS = (32, 64, 128)
"""Channels of a group."""
MAX_LAUNCHES = 2
"""Of a product; with more tokens than these take, the weights are expanded for a dense product."""
EXPANDED_BYTES = 256 << 20
"""Of weights that are expanded at once."""


class LowBitCUDA(nn.Module):
    """A layer's bulk on a CUDA device; its specification is :class:`quant_methods.kernels.low_bit.LowBitLinear`.

    Args:
        part: codes of 2 to 7 bits on a grid, in groups of 32, 64 or 128 channels or whole rows, streams of a trellis
            code in such groups, or codes of 3 or 4 bits with tables; 8 divides the input channels.
        dtype: bfloat16 or float16, of activations and results.

    Raises:
        ParetoError: a shape or dtype that the kernel does not serve.

    """

    def __init__(self, part: GridCodes | TableCodes | TrellisCodes, dtype: torch.dtype) -> None:
        super().__init__()
        table, self.trellis = isinstance(part, TableCodes), isinstance(part, TrellisCodes)
        (self.rows, self.channels), self.bits, self.dtype = part.shape, part.bits, dtype
        widths = (3, 4) if table else range(2, 8)
        if self.bits not in widths or dtype not in (torch.bfloat16, torch.float16) or self.channels % 8:
            what = "tables of 3 or 4 bits" if table else "codes of 2 to 7 bits"
            raise ParetoError(f"the low-bit kernel serves {what}, 16-bit activations and channels in eights")
        self.units, self.tiles = -(-self.channels // CHANNELS), -(-self.rows // ROWS)
        groups, entries, self.group_steps = None, None, CHANNELS // 16
        if isinstance(part, TrellisCodes):
            words, groups = pack_trellis(part.words), self._groups(part.scale, torch.zeros_like(part.scale))
        elif isinstance(part, GridCodes):
            half = 1 << (self.bits - 1)
            words = pack((part.codes.to(torch.int16) + half).to(torch.uint8), self.bits)
            magic = (128 if dtype == torch.bfloat16 else 1024) + half
            groups = self._groups(part.scale, -magic - part.zero_point.float())
        else:
            words = pack(part.codes.to(torch.uint8), self.bits, table=True)
            entries = self._entries(part.table)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("table", entries, persistent=False)

    def _entries(self, table: Tensor) -> Tensor:
        """Return the bytes of tables."""
        padded = torch.zeros(self.tiles * ROWS, table.shape[1], dtype=self.dtype, device=table.device)
        padded[: self.rows] = table
        # Axes: tile, row g, row r, low bytes and high bytes, entry.
        both = padded.view(torch.uint8).unflatten(1, (-1, 2)).transpose(1, 2)
        return both.unflatten(0, (self.tiles, 4, 8)).transpose(1, 2).contiguous()

    def _groups(self, scale: Tensor, added: Tensor) -> Tensor:
        """Return scales and what is to be added to codes, [row tiles, groups, row g, row r, 2]."""
        groups = scale.shape[1]
        width = self.channels // groups
        if groups == 1:  # One scale for the whole row: every unit has it.
            groups, width = self.units, CHANNELS
            scale, added = scale.expand(-1, groups), added.expand(-1, groups)
        if width not in GROUPS or width * groups < self.channels:
            raise ParetoError(f"the low-bit kernel serves groups of 32, 64 or 128 channels, not of {width}")
        self.group_steps = width // 16
        both = torch.stack([scale.to(self.dtype), added.to(self.dtype)], 2)
        padded = both.new_zeros(self.tiles * ROWS, self.units * CHANNELS // width, 2)
        padded[: self.rows, :groups] = both
        # A lane's rows are neighbours in a trellis, whose tile is one stream.
        split = padded.unflatten(0, (self.tiles, 8, 4) if self.trellis else (self.tiles, 4, 8))
        return split.permute(*((0, 3, 1, 2, 4) if self.trellis else (0, 3, 2, 1, 4))).contiguous()

    def apply(self, x: Tensor, beside: Beside | None = None) -> Tensor:
        """Return the product [..., out] with inputs [..., in], both in ``dtype``, of the bulk and what lies beside."""
        x, shape = x.reshape(-1, self.channels), x.shape[:-1]
        parts = list(BesideParts() if beside is None else beside.parts(x))
        how = self.rows, self.bits, self.group_steps, self.trellis
        y = low_bit_linear(x, self.words, self.groups, self.table, parts, *how)
        return y.reshape(*shape, self.rows)

    def weight(self) -> Tensor:
        """Return the weight [out, in] in ``dtype``."""
        return self.matrix().expand(self.dtype, 0, self.tiles)

    def prepare(self) -> None:
        """See :meth:`quant_methods.kernels.low_bit_matrix.PackedMatrix.prepare`."""
        self.matrix().prepare(self.dtype)

    def matrix(self) -> PackedMatrix:
        """Return what the kernels are launched on."""
        how = self.rows, self.channels, self.bits, self.group_steps, self.trellis
        return PackedMatrix(self.words, self.groups, self.table, *how)


def low_bit_module(part: GridCodes | TableCodes, dtype: torch.dtype) -> LowBitCUDA | LowBitLinear:
    """Return what multiplies by a layer's bulk on a CUDA device: the kernel where it serves it, else PyTorch.

    Takes the arguments of :class:`LowBitCUDA`, and tables of 2 bits besides: to the kernel these are tables of 3 bits
    of which the codes use the first half.
    """
    padded = part
    if isinstance(part, TableCodes) and part.bits == 2:
        padded = TableCodes(part.codes, functional.pad(part.table, (0, 4)))
    try:
        return LowBitCUDA(padded, dtype)
    except ParetoError:
        return LowBitLinear(part, dtype)


@torch.library.custom_op("pareto::low_bit_linear", mutates_args=())
def low_bit_linear(
    x: Tensor,
    words: Tensor,
    groups: Tensor | None,
    table: Tensor | None,
    beside: list[Tensor | None],
    rows: int,
    bits: int,
    group_steps: int,
    trellis: bool,
) -> Tensor:
    """Return x W^T and what lies beside, by the kernels or, with many rows of x, by a dense product.

    One operator, since the kernel that adds what lies beside may start before the bulk's has ended if it is the next.

    Args:
        x: [tokens, in] bfloat16 or float16.
        words: as ``pack`` returns them.
        groups: scales and offsets as :class:`LowBitCUDA` lays them out, in the dtype of x, or None.
        table: bytes of the look-up tables, or None.
        beside: what lies beside, the fields of :class:`quant_methods.kernels.beside.BesideParts`.
        rows: output channels.
        bits: of a code.
        group_steps: channels of a group, in sixteens.
        trellis: whether the words are streams of a trellis code.

    Returns:
        [tokens, rows] in the dtype of x.

    """
    matrix = PackedMatrix(words, groups, table, rows, x.shape[1], bits, group_steps, trellis)
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
    groups: Tensor | None,
    table: Tensor | None,
    beside: list[Tensor | None],
    rows: int,
    bits: int,
    group_steps: int,
    trellis: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)
