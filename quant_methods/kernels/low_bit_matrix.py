"""Launches of the low-bit kernel: how work is arranged, and the host's side of ``csrc/low_bit.cu``."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kv_cache.cuda.runtime.device import RESERVED_SHARED, device_limits
from kv_cache.cuda.runtime.launch import Kernel, compile_ahead, load_kernel
from kv_cache.doors import expect, in_line, is_vector
from kv_cache.errors import ParetoError
from quant_methods.formats.parts.trellis import FLIP, INCREMENTS, KEEP, MULTIPLIERS
from quant_methods.kernels.low_bit_layout import CHANNELS, ROWS

FOLDER = Path(__file__).parent / "csrc"
MAX_TOKENS = 64
"""Of a launch of the kernel."""
COLUMN_TILES = (1, 2, 3, 4, 6, 8)
"""Tiles of 8 columns that there are kernels for."""
BOUNDS = (1, 2, 4, *(8 * tiles for tiles in COLUMN_TILES))
"""Numbers of tokens that work is arranged for; others are arranged as the next larger one."""
MOST_BLOCKS = 3
"""Thread blocks of a multiprocessor."""
PAIR_MACROS = {
    **{f"MULTIPLIER_{i}": number for i, number in enumerate(MULTIPLIERS)},
    **{f"INCREMENT_{i}": number for i, number in enumerate(INCREMENTS)},
    "KEEP": KEEP,
    "FLIP": FLIP,
}
"""Of ``csrc/trellis_pair.cuh``."""
_EVEN_ENOUGH = 0.7
"""Share of the multiprocessors that are busy while whole tiles are dealt out, from which no tile is shared."""

_EXPANDING_WARPS = 8
SELECTOR_BYTES = 16 << 10
"""Of a thread block's table for bitmaps: ``SELECTOR_WORDS`` in ``csrc/low_bit_bitmap.cuh``."""
_CODE_LINES = 16
"""Lines of 16 bytes, of which multiples are kept free for a unit's codes, so that few kernels are compiled."""

_i32, _i64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Params(ctypes.Structure):
    _fields_ = (
        ("words", _ptr),
        ("side", _ptr),
        ("kept", _ptr),
        ("starts", _ptr),
        ("x", _ptr),
        ("y", _ptr),
        ("parts", _ptr),
        ("arrivals", _ptr),
        ("x_stride", _i64),
        ("y_stride", _i64),
        ("columns", _i32),
        ("channels", _i32),
        ("rows", _i32),
        ("units", _i32),
        ("tiles", _i32),
        ("steps", _i32),
        ("grain", _i32),
        ("share", _i32),
        ("larger", _i32),
    )


@dataclass(frozen=True)
class Arrangement:
    """How the multiprocessors share a product's work; see ``csrc/low_bit.cu``.

    Attributes:
        warps: of a thread block.
        row_warps: of them, those with rows of their own.
        stages: of the ring in shared memory.
        blocks: thread blocks of a multiprocessor.
        whole: whether a thread block takes whole tiles of rows only.
        alone: whether each warp has activations of its own in shared memory.
        units: of 128 channels, that a warp has in a step: 1 or 2.

    """

    warps: int
    row_warps: int
    stages: int
    blocks: int
    whole: bool
    alone: bool = False
    units: int = 1

    def shared_bytes(self, bits: int, side_bytes: int, columns: int, more: int = 0) -> int:
        """Return what a thread block needs: the ring, and a place for sums (``SLOT_WORDS`` etc. in the source).

        Args:
            bits: of a weight in memory.
            side_bytes: that go with a unit's codes.
            columns: of activations.
            more: bytes that it needs besides.

        """
        depth = self.warps // self.row_warps
        wide = 2 * CHANNELS * self.units
        activations = self.warps * (wide + 64) if self.alone else wide * depth + 64
        stage = self.warps * self.units * (512 * bits + side_bytes) + columns * activations
        return self.stages * stage + (self.warps - self.row_warps) * column_tiles(columns) * 1024 + more


@dataclass(frozen=True)
class PackedMatrix:
    """Arguments of the kernels: see :func:`quant_methods.kernels.low_bit_cuda.low_bit_linear`."""

    words: Tensor
    side: Tensor
    kind: str
    rows: int
    channels: int
    bits: int
    group_steps: int
    kept: Tensor | None = None
    starts: Tensor | None = None
    most_lines: int = 0

    @property
    def tiles(self) -> int:
        """Tiles of 32 rows."""
        return self.words.shape[0]

    @property
    def units(self) -> int:
        """Units of 128 channels."""
        return self.words.shape[1]

    @property
    def unit_bits(self) -> int:
        """What each weight has in the words of its unit: a code, or a bit of the bitmap."""
        return 1 if self.kind == "bitmap" else self.bits

    @property
    def code_bytes(self) -> int:
        """Room for the codes of a unit with a bitmap, whose number differs."""
        return 16 * _CODE_LINES * -(-self.most_lines // _CODE_LINES)

    @property
    def side_bytes(self) -> int:
        """What goes with a unit's words: scales with or without offsets, or tables, and codes with a bitmap."""
        groups = CHANNELS // (16 * self.group_steps)
        of_row = {"grid": 4 * groups, "table": 2 << self.bits, "trellis": 2 * groups}
        of_row |= dict.fromkeys(("semi_sparse", "bitmap"), 4 * groups)
        return ROWS * of_row[self.kind] + self.code_bytes

    @property
    def table_bytes(self) -> int:
        """Of what a thread block has in shared memory for all of its units."""
        return SELECTOR_BYTES if self.kind == "bitmap" else 0

    def shared_bytes(self, arrangement: Arrangement, columns: int) -> int:
        """Return what a thread block needs; see :meth:`Arrangement.shared_bytes`."""
        return arrangement.shared_bytes(self.unit_bits, self.side_bytes, columns, self.table_bytes)

    def macros(self, dtype: torch.dtype, tokens: int, arrangement: Arrangement) -> tuple[tuple[str, int], ...]:
        """Return what ``multiply`` is compiled with."""
        a, tiles = arrangement, column_tiles(tokens)
        # With few columns there is room for the next kernel's blocks, which begin to fetch before this one's end.
        resident = max(a.blocks, 16 // a.warps if tiles <= 2 else 8 // a.warps, 1)
        return self._macros(
            dtype, WARPS=a.warps, ROW_WARPS=a.row_warps, UNITS=a.units, COLUMN_TILES=tiles, STAGES=a.stages,
            ALONE=int(a.alone), RESIDENT=resident,
        )  # fmt: skip

    def _macros(self, dtype: torch.dtype, **others: int) -> tuple[tuple[str, int], ...]:
        macros = {"BITS": self.unit_bits, "IN_BFLOAT": int(dtype == torch.bfloat16), "GROUP_STEPS": self.group_steps}
        macros |= {kind.upper(): int(self.kind == kind) for kind in ("table", "trellis", "semi_sparse", "bitmap")}
        macros |= {"CODE_WORDS": self.code_bytes // 4}
        macros |= {"BULK_COPY": 0, "PARAMS_BYTES": ctypes.sizeof(_Params)} | others
        if self.kind == "trellis":
            macros |= PAIR_MACROS
        return tuple(macros.items())

    def arrangement(self, tokens: int) -> Arrangement:
        """Return how to arrange a product with that many tokens."""
        return _arrangement(
            self.tiles, self.units, self.unit_bits, self.side_bytes, bound(tokens), self.words.device, self.table_bytes,
            self.kind,
        )  # fmt: skip

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile and load what products need, so that none waits for it, or does it while a graph is captured."""
        macros = {self.macros(dtype, tokens, self.arrangement(tokens)) for tokens in BOUNDS}
        macros.add(self._expanding(dtype))
        compile_ahead("low_bit.cu", macros, self.words.device, FOLDER)
        for tokens in BOUNDS:
            self._multiplying(dtype, tokens, self.arrangement(tokens))
        self._expander(dtype)
        _arrivals(self.words.data_ptr(), self.words.device)

    def _multiplying(self, dtype: torch.dtype, tokens: int, a: Arrangement) -> Kernel:
        shared = self.shared_bytes(a, bound(tokens))
        macros = self.macros(dtype, tokens, a)
        return load_kernel("low_bit.cu", "multiply", macros, self.words.device, shared, folder=FOLDER)

    def _expander(self, dtype: torch.dtype) -> Kernel:
        macros, device = self._expanding(dtype), self.words.device
        return load_kernel("low_bit.cu", "expand", macros, device, self.table_bytes, folder=FOLDER)

    def _expanding(self, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
        return self._macros(
            dtype, WARPS=_EXPANDING_WARPS, ROW_WARPS=1, UNITS=1, COLUMN_TILES=1, STAGES=2, RESIDENT=1, ALONE=0
        )  # fmt: skip

    def multiply(self, x: Tensor, y: Tensor, arrangement: Arrangement | None = None) -> None:
        """Write x W^T to y, both in rows.

        Raises:
            ParetoError: shapes, strides or dtypes do not fit: the kernel sees addresses alone.

        """
        words, side = self.words, self.side
        expect(
            "the low-bit kernel",
            (
                (words.dtype == torch.int32 and words.is_contiguous(), "codes that lie as they were packed"),
                (words.dim() == 3 and words.shape[2] == CHANNELS * self.unit_bits, f"codes of {self.unit_bits} bits"),
                (side.is_contiguous() and side.device == words.device, "scales or tables as they were packed"),
                (x.dtype in (torch.bfloat16, torch.float16), f"16-bit inputs, not {x.dtype}"),
                (x.dim() == 2 and x.shape[1] == self.channels, f"inputs [tokens, {self.channels}]"),
                (self.kind == "table" or side.dtype == x.dtype, "scales in the inputs' dtype"),
                (y.dtype == x.dtype and tuple(y.shape) == (len(x), self.rows), f"as many outputs, {self.rows} wide"),
                (in_line(y), "outputs whose rows have no gaps"),
                (x.device == y.device == self.words.device, f"tensors on {self.words.device}"),
                *self._asked_of_codes(),
            ),
        )
        tokens, device = x.shape[0], self.words.device
        if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        a = arrangement or self.arrangement(tokens)
        kernel = self._multiplying(x.dtype, tokens, a)
        steps, tiles = -(-self.units // (a.warps // a.row_warps * a.units)), -(-self.tiles // a.row_warps)
        processors, _, overlap = device_limits(device)
        grain = steps if a.whole else 1
        dealt = tiles * steps // grain
        blocks = min(processors * a.blocks, dealt)
        parts = arrivals = None
        if not a.whole:
            parts = y.new_empty(blocks * 2 * a.row_warps * ROWS * 8 * column_tiles(tokens), dtype=torch.float32)
            arrivals = _arrivals(self.words.data_ptr(), device)
        params = _Params(
            words.data_ptr(), side.data_ptr(), _pointer(self.kept), _pointer(self.starts),
            x.data_ptr(), y.data_ptr(), _pointer(parts), _pointer(arrivals),
            x.stride(0), y.stride(0), tokens, self.channels,
            self.rows, self.units, self.tiles, steps, grain, *divmod(dealt, blocks),
        )  # fmt: skip
        kernel.launch((blocks, 1, 1), 32 * a.warps, params, device, overlap=overlap)

    def _asked_of_codes(self) -> list[tuple[bool, str]]:
        """Return what the kernel asks of the codes with a bitmap; see :func:`kv_cache.doors.expect`."""
        kept, starts = self.kept, self.starts
        if self.kind != "bitmap":
            return [(kept is None and starts is None, "codes and their starts with a bitmap alone")]
        if kept is None or starts is None:
            return [(False, "codes and their starts with a bitmap")]
        count = self.tiles * self.units + 1
        return [
            (kept.dtype == torch.int32 and kept.is_contiguous(), "codes as they were packed"),
            (kept.shape[1:] == (4,), "codes in lines of 4 words"),
            (is_vector(starts, torch.int32) and len(starts) == count, f"{count} starts of codes"),
            (kept.device == starts.device == self.words.device, f"tensors on {self.words.device}"),
        ]

    def expand(self, dtype: torch.dtype, first: int, last: int) -> Tensor:
        """Return the weight of the row tiles from first to before last, [rows, channels]."""
        warps, device = _EXPANDING_WARPS, self.words.device
        y = torch.empty(min(last * ROWS, self.rows) - first * ROWS, self.channels, dtype=dtype, device=device)
        kernel = self._expander(dtype)
        starts = None if self.starts is None else self.starts[first * self.units :]
        # The part looks like a matrix of its own.
        params = _Params(
            self.words[first].data_ptr(), self.side[first].data_ptr(), _pointer(self.kept), _pointer(starts),
            0, y.data_ptr(), 0, 0, 0, y.stride(0), 0,
            self.channels, len(y), self.units, last - first,
        )  # fmt: skip
        kernel.launch((last - first, -(-self.units // warps), 1), 32 * warps, params, device)
        return y


@functools.cache
def _arrangement(
    row_tiles: int, units: int, bits: int, side_bytes: int, tokens: int, device: torch.device, more: int, kind: str
) -> Arrangement:
    """Return what was fastest or nearly so on an H100 (bench/lab/weight_kernel_tuning.py), or what next to it fits."""
    processors, shared, _ = device_limits(device)
    few_rows = row_tiles <= 2 * processors
    little_work = row_tiles * units < 64 * processors
    if tokens <= 2:
        wanted = Arrangement(8, 1, 4, 2, True, True)
        if kind == "semi_sparse":  # On an H200, 32.4 us for a layer of Mistral-7B's shape instead of 35.4.
            wanted = Arrangement(8, 1, 3, 2, True, True, units=2)
    elif tokens <= 8:
        wanted = Arrangement(8, 1, 4, 1, True, True) if few_rows else Arrangement(8, 4, 4, 2, True)
    elif tokens <= 16:
        wanted = Arrangement(4, 2, 4, 3, False) if little_work else Arrangement(8, 4, 4, 2, False)
    elif tokens <= 32:
        wanted = Arrangement(8, 4, 4, 1, False) if little_work else Arrangement(4, 4, 4, 3, False)
    else:
        wanted = Arrangement(8, 4, 3, 1, False) if few_rows else Arrangement(8, 8, 4, 1, False)
    # Whole tiles save adding up what blocks share, unless too many multiprocessors are left without one.
    rounds = -(-row_tiles // wanted.row_warps) / processors
    if rounds < _EVEN_ENOUGH * math.ceil(rounds):
        wanted = dataclasses.replace(wanted, whole=False)
    warps, rows = (wanted.warps, 4), (wanted.row_warps, 8, 4, 2, 1)
    for alone, count, blocks, own in itertools.product((wanted.alone, False), warps, range(wanted.blocks, 0, -1), rows):
        for stages in range(wanted.stages, 1, -1):
            found = Arrangement(count, min(own, count), stages, blocks, wanted.whole, alone, wanted.units)
            bytes_ = found.shared_bytes(bits, side_bytes, tokens, more)
            if blocks * (bytes_ + RESERVED_SHARED) <= shared + RESERVED_SHARED:
                return found
    raise ParetoError(f"{bits} bits and {tokens} tokens need more than the device's {shared} bytes of shared memory")


def bound(tokens: int) -> int:
    """Return the number of tokens that a product with so many is arranged as."""
    return next(most for most in BOUNDS if most >= tokens)


def column_tiles(tokens: int) -> int:
    """Return the tiles of 8 columns of the kernel for that many tokens."""
    return next(count for count in COLUMN_TILES if 8 * count >= tokens)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _arrivals(matrix: int, device: torch.device) -> Tensor:
    """Return a matrix's own counts, which are zeros whenever no product with it runs."""
    return torch.zeros(MOST_BLOCKS * device_limits(device)[0], dtype=torch.int32, device=device)
