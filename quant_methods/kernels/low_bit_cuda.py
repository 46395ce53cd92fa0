"""Products with weights of 2 to 7 bits on a CUDA device: the host's side of ``csrc/low_bit.cu``."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from kv_cache.gpu.launch import Kernel, load_kernel
from kv_cache.gpu.sides import device_limits
from quant_methods.kernels.low_bit import LowBitLinear

FOLDER = Path(__file__).parent / "csrc"
ROWS, CHANNELS, STEPS = 16, 128, 8
"""Of a unit, and the steps in it; see ``csrc/low_bit.cu``."""
MAX_TOKENS = 64
"""Of a product by the kernel; with more, the weights are expanded for a dense product."""
MAX_COLUMN_TILES = 4
"""Tiles of 8 columns that a thread block takes."""
EXPANDED_BYTES = 256 << 20
"""Of weights that are expanded at once."""
_PACKED_AT_ONCE = 1 << 24
"""Codes."""

_i32, _i64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Params(ctypes.Structure):
    _fields_ = (
        ("words", _ptr),
        ("groups", _ptr),
        ("table", _ptr),
        ("x", _ptr),
        ("y", _ptr),
        ("x_stride", _i64),
        ("y_stride", _i64),
        ("columns", _i32),
        ("channels", _i32),
        ("rows", _i32),
        ("units", _i32),
        ("tiles", _i32),
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Lay codes out as the kernel reads them.

    Args:
        codes: uint8 [rows, channels] from 0.
        bits: 2 to 7.

    Returns:
        int32 [row tiles, units, 64 * bits].

    """
    rows, channels = codes.shape
    tiles, units = -(-rows // ROWS), -(-channels // CHANNELS)
    words = torch.empty(tiles, units, 64 * bits, dtype=torch.int32, device=codes.device)
    at_once = max(_PACKED_AT_ONCE // (units * CHANNELS * ROWS), 1)
    for start in range(0, tiles, at_once):
        stop = min(start + at_once, tiles)
        part = codes.new_zeros((stop - start) * ROWS, units * CHANNELS)
        given = codes[start * ROWS : stop * ROWS]
        part[: len(given), :channels] = given
        # Axes: tile, half of its rows, row g, unit, step, t, pair of the step, element of the pair.
        split = part.reshape(stop - start, 2, 8, units, STEPS, 4, 2, 2)
        # Axes: tile, unit, lane (g, t), half, pair, element.
        pairs = split.permute(0, 3, 2, 5, 1, 4, 6, 7).reshape(stop - start, units, 32, 2, 16, 2).int()
        begin, offset = 0, 0
        for width in (4, 2, 1):
            if not bits & width:
                continue
            plane = ((pairs >> offset) & ((1 << width) - 1)).unflatten(4, (width, 16 // width))
            at = torch.arange(16 // width, device=codes.device, dtype=torch.int32) * width
            shifts = at[:, None] + torch.tensor([0, 16], device=codes.device, dtype=torch.int32)
            packed = (plane << shifts).sum((-1, -2), dtype=torch.int32)
            words[start:stop, :, begin : begin + 64 * width] = packed.flatten(2)
            begin, offset = begin + 64 * width, offset + width
    return words


class LowBitCUDA(nn.Module):
    """A layer's bulk on a CUDA device; its specification is :class:`quant_methods.kernels.low_bit.LowBitLinear`.

    Args:
        codes: int8 [out, in]: on a grid signed codes, with a table its indices, from 0. 8 divides ``in``.
        scale: [out, groups], of groups of 32, 64 or 128 channels or whole rows; unused with a table.
        zero_point: int8 [out, groups]; unused with a table.
        table: [out, 2^bits] or None.
        dtype: bfloat16 or float16, of activations and results.
        bits: 2 to 7; with a table 3 or 4.

    Raises:
        ParetoError: a shape or dtype that the kernel does not serve.

    """

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor | None, dtype: torch.dtype, bits: int
    ) -> None:
        super().__init__()
        (self.rows, self.channels), self.bits, self.dtype = codes.shape, bits, dtype
        widths = (3, 4) if table is not None else range(2, 8)
        if bits not in widths or dtype not in (torch.bfloat16, torch.float16) or self.channels % 8:
            what = "tables of 3 or 4 bits" if table is not None else "codes of 2 to 7 bits"
            raise ParetoError(f"the low-bit kernel serves {what}, 16-bit activations and channels in eights")
        self.units, self.tiles = -(-self.channels // CHANNELS), -(-self.rows // ROWS)
        groups, entries, self.group_steps = None, None, STEPS
        if table is None:
            groups = self._groups(scale, zero_point)
        else:
            padded = torch.zeros(self.tiles * ROWS, 1 << bits, dtype=dtype, device=codes.device)
            padded[: self.rows] = table
            # Low bytes, then high bytes.
            entries = padded.view(torch.uint8).unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
        unsigned = codes if table is not None else codes.to(torch.int16) + (1 << (bits - 1))
        self.register_buffer("words", pack(unsigned.to(torch.uint8), bits), persistent=False)
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("table", entries, persistent=False)

    def _groups(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return scales and what is to be added to codes, [row tiles, groups, 2, 16]."""
        groups = scale.shape[1]
        width = self.channels // groups
        if groups == 1:  # One scale for the whole row: every unit has it.
            groups, width = self.units, CHANNELS
            scale, zero_point = scale.expand(-1, groups), zero_point.expand(-1, groups)
        if width not in (32, 64, 128) or width * groups < self.channels:
            raise ParetoError(f"the low-bit kernel serves groups of 32, 64 or 128 channels, not of {width}")
        self.group_steps = width // 16
        magic = (128 if self.dtype == torch.bfloat16 else 1024) + (1 << (self.bits - 1))
        both = torch.stack([scale.to(self.dtype), (-magic - zero_point.float()).to(self.dtype)], 1)
        padded = both.new_zeros(self.tiles * ROWS, 2, self.units * CHANNELS // width)
        padded[: self.rows, :, :groups] = both
        return padded.unflatten(0, (self.tiles, ROWS)).permute(0, 3, 2, 1).contiguous()

    def apply(self, x: Tensor) -> Tensor:
        """Return the product [..., out] with inputs [..., in], both in ``dtype``."""
        parts = self.words, self.groups, self.table
        y = low_bit_linear(x.reshape(-1, self.channels), *parts, self.rows, self.bits, self.group_steps)
        return y.reshape(*x.shape[:-1], self.rows)

    def weight(self) -> Tensor:
        """Return the weight [out, in] in ``dtype``."""
        matrix = _Matrix(self.words, self.groups, self.table, self.rows, self.channels, self.bits, self.group_steps)
        return matrix.expand(self.dtype, 0, self.tiles)


def low_bit_module(
    codes: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor | None, dtype: torch.dtype, bits: int
) -> nn.Module:
    """Return what multiplies by a layer's bulk on a CUDA device: the kernel where it serves it, else PyTorch.

    Takes the arguments of :class:`LowBitCUDA`.
    """
    try:
        return LowBitCUDA(codes, scale, zero_point, table, dtype, bits)
    except ParetoError:
        return LowBitLinear(codes, scale, zero_point, table, dtype)


@torch.library.custom_op("pareto::low_bit_linear", mutates_args=())
def low_bit_linear(
    x: Tensor, words: Tensor, groups: Tensor | None, table: Tensor | None, rows: int, bits: int, group_steps: int
) -> Tensor:
    """Return x W^T, by the kernel or, with many rows of x, by a dense product with expanded weights.

    Args:
        x: [tokens, in] bfloat16 or float16.
        words: as ``pack`` returns them.
        groups: scales and offsets as :class:`LowBitCUDA` lays them out, in the dtype of x, or None.
        table: bytes of the look-up tables, or None.
        rows: output channels.
        bits: of a code.
        group_steps: channels of a group, in sixteens.

    Returns:
        [tokens, rows] in the dtype of x.

    """
    matrix = _Matrix(words, groups, table, rows, x.shape[1], bits, group_steps)
    y = x.new_empty(x.shape[0], rows)
    if x.shape[0] > MAX_TOKENS:
        at_once = max(EXPANDED_BYTES // (2 * x.shape[1] * ROWS), 1)
        for first in range(0, matrix.tiles, at_once):
            weight = matrix.expand(x.dtype, first, min(first + at_once, matrix.tiles))
            torch.mm(x, weight.T, out=y[:, first * ROWS : first * ROWS + len(weight)])
    elif x.shape[0]:
        matrix.multiply(x, y)
    return y


@low_bit_linear.register_fake
def _(
    x: Tensor, words: Tensor, groups: Tensor | None, table: Tensor | None, rows: int, bits: int, group_steps: int
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@dataclass(frozen=True)
class _Matrix:
    """Arguments of the kernels: see :func:`low_bit_linear`."""

    words: Tensor
    groups: Tensor | None
    table: Tensor | None
    rows: int
    channels: int
    bits: int
    group_steps: int

    @property
    def tiles(self) -> int:
        return self.words.shape[0]

    def _kernel(self, name: str, dtype: torch.dtype, column_tiles: int) -> tuple[Kernel, int, int]:
        """Return a kernel, the warps of a thread block, and how many blocks the device holds."""
        device = self.words.device
        processors = device_limits(device)[0]
        # Enough warps to keep the memory busy where a matrix has few row tiles.
        warps = 8 if self.tiles > processors else 16
        kernel, resident = _kernel(
            name, self.bits, dtype == torch.bfloat16, self.table is not None, warps, column_tiles, self.group_steps,
            device,
        )  # fmt: skip
        return kernel, warps, resident * processors

    def multiply(self, x: Tensor, y: Tensor) -> None:
        tokens, device = x.shape[0], self.words.device
        if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
            x = x.contiguous()
        column_tiles = 1 << (min(-(-tokens // 8), MAX_COLUMN_TILES) - 1).bit_length()
        kernel, warps, blocks = self._kernel("multiply", x.dtype, column_tiles)
        params = _Params(
            self.words.data_ptr(), _pointer(self.groups), _pointer(self.table), x.data_ptr(), y.data_ptr(), x.stride(0),
            y.stride(0), tokens, self.channels, self.rows, self.words.shape[1], self.tiles,
        )  # fmt: skip
        grid = (min(self.tiles, blocks), -(-tokens // (8 * column_tiles)), 1)
        kernel.launch(grid, 32 * warps, params, device, overlap=device_limits(device)[2])

    def expand(self, dtype: torch.dtype, first: int, last: int) -> Tensor:
        """Return the weight of the row tiles from first to before last, [rows, channels]."""
        units, device = self.words.shape[1], self.words.device
        y = torch.empty(min(last * ROWS, self.rows) - first * ROWS, self.channels, dtype=dtype, device=device)
        kernel, warps, _ = self._kernel("expand", dtype, 1)
        # The part looks like a matrix of its own.
        groups, table = self.groups, self.table
        params = _Params(
            self.words[first].data_ptr(), _pointer(None if groups is None else groups[first]),
            _pointer(None if table is None else table[first * ROWS]), 0, y.data_ptr(), 0, y.stride(0), 0, self.channels,
            len(y), units, last - first,
        )  # fmt: skip
        kernel.launch((last - first, -(-units // warps), 1), 32 * warps, params, device)
        return y


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _kernel(
    name: str,
    bits: int,
    bfloat: bool,
    table: bool,
    warps: int,
    column_tiles: int,
    group_steps: int,
    device: torch.device,
) -> tuple[Kernel, int]:
    macros = (
        ("BITS", bits), ("IN_BFLOAT", int(bfloat)), ("TABLE", int(table)), ("WARPS", warps),
        ("COLUMN_TILES", column_tiles), ("GROUP_STEPS", group_steps), ("BULK_COPY", 0),
    )  # fmt: skip
    kernel = load_kernel("low_bit.cu", name, macros, device, folder=FOLDER)
    return kernel, kernel.blocks_per_multiprocessor(32 * warps)
