"""Products with weights of 2 to 7 bits on a CUDA device: the host's side of ``csrc/low_bit.cu``."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from kv_cache.gpu.launch import Kernel, load_kernel

FOLDER = Path(__file__).parent / "csrc"
ROWS, CHANNELS, STEPS = 16, 128, 8
"""Of a unit, and the steps in it; see ``csrc/low_bit.cu``."""
MAX_COLUMNS = 64
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


class LowBitMatrix:
    """A weight [rows, channels] on a CUDA device that activations are multiplied with.

    Args:
        codes: int8 [rows, channels]: on a grid signed codes, with a table its indices, from 0. Channels are a multiple
            of 8.
        bits: 2 to 7; with a table 3 or 4.
        scale: [rows, groups], of groups of 32, 64 or 128 channels or whole rows; unused with a table.
        zero_point: [rows, groups] integers; unused with a table.
        table: [rows, 2^bits] or None.
        dtype: bfloat16 or float16, of activations and results.

    Raises:
        ParetoError: a shape or dtype that the kernel does not serve.

    """

    def __init__(
        self, codes: Tensor, bits: int, scale: Tensor, zero_point: Tensor, table: Tensor | None, dtype: torch.dtype
    ) -> None:
        (self.rows, self.channels), self.bits, self.dtype, self.device = codes.shape, bits, dtype, codes.device
        widths = (3, 4) if table is not None else range(2, 8)
        if bits not in widths or dtype not in (torch.bfloat16, torch.float16) or self.channels % 8:
            what = "tables of 3 or 4 bits" if table is not None else "codes of 2 to 7 bits"
            raise ParetoError(f"the low-bit kernel serves {what}, 16-bit activations and channels in eights")
        self.units, self.tiles = -(-self.channels // CHANNELS), -(-self.rows // ROWS)
        unsigned = codes if table is not None else codes.to(torch.int16) + (1 << (bits - 1))
        self.words = pack(unsigned.to(torch.uint8), bits)
        self.groups = self.table = None
        self.group_steps = STEPS
        if table is None:
            self.groups = self._groups(scale, zero_point)
        else:
            entries = torch.zeros(self.tiles * ROWS, 1 << bits, dtype=dtype, device=self.device)
            entries[: self.rows] = table
            # Low bytes, then high bytes.
            self.table = entries.view(torch.uint8).unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
        properties = torch.cuda.get_device_properties(self.device)
        self._processors: int = properties.multi_processor_count
        # Enough warps to keep the memory busy where a matrix has few row tiles.
        self._warps = 8 if self.tiles > self._processors else 16

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

    def _kernel(self, name: str, column_tiles: int) -> tuple[Kernel, int]:
        """Return a kernel and how many of its thread blocks the device holds."""
        return _kernel(
            name, self.bits, self.dtype == torch.bfloat16, self.table is not None, self._warps, column_tiles,
            self.group_steps, self.device,
        )  # fmt: skip

    def _params(self, x: Tensor | None, y: Tensor) -> _Params:
        def pointer(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        columns, x_stride = (0, 0) if x is None else (len(x), x.stride(0))
        return _Params(
            self.words.data_ptr(), pointer(self.groups), pointer(self.table), pointer(x), y.data_ptr(), x_stride,
            y.stride(0), columns, self.channels, self.rows, self.units, self.tiles,
        )  # fmt: skip

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W^T.

        Args:
            x: [columns, channels] in ``dtype``.

        Returns:
            [columns, rows] in ``dtype``.

        """
        columns = len(x)
        if columns > MAX_COLUMNS:
            return self._multiply_expanded(x)
        if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
            x = x.contiguous()
        y = x.new_empty(columns, self.rows)
        if not columns:
            return y
        tiles = 1 << (min(-(-columns // 8), MAX_COLUMN_TILES) - 1).bit_length()
        kernel, resident = self._kernel("multiply", tiles)
        grid = (min(self.tiles, resident * self._processors), -(-columns // (8 * tiles)), 1)
        kernel.launch(grid, 32 * self._warps, self._params(x, y), self.device, overlap=_overlaps(self.device))
        return y

    def expand(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return the weight of some row tiles, [rows, channels] in ``dtype``.

        Args:
            first: row tile.
            last: row tile after the last one; None for all.

        """
        last = self.tiles if last is None else last
        rows = min(last * ROWS, self.rows) - first * ROWS
        y = torch.empty(rows, self.channels, dtype=self.dtype, device=self.device)
        params = self._params(None, y)
        # The part looks like a matrix of its own.
        params.words += 4 * self.words.stride(0) * first
        if self.groups is not None:
            params.groups += 2 * self.groups.stride(0) * first
        if self.table is not None:
            params.table += self.table.stride(0) * ROWS * first
        params.rows, params.tiles = rows, last - first
        kernel, _ = self._kernel("expand", 1)
        kernel.launch((last - first, -(-self.units // self._warps), 1), 32 * self._warps, params, self.device)
        return y

    def _multiply_expanded(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.rows)
        at_once = max(EXPANDED_BYTES // (2 * self.channels * ROWS), 1)
        for first in range(0, self.tiles, at_once):
            last = min(first + at_once, self.tiles)
            weight = self.expand(first, last)
            torch.mm(x, weight.T, out=y[:, first * ROWS : first * ROWS + len(weight)])
        return y


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


@functools.cache
def _overlaps(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9
