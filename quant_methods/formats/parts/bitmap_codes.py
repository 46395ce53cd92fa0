"""4-bit codes on a grid of the weights that are not zero alone, and a bit for each weight that says whether it is.

The grid is that of ``grid_codes.py``, ``(code - zero_point) * scale``, so that a weight is zero where its code is the
zero-point, and nowhere else. Blocks of 32 output by 128 input channels lie one after the other, as the CUDA kernel
reads them (``kernels/csrc/low_bit_bitmap.cuh``). Lane ``4 g + t`` has of each step of 32 channels a word of the bitmap:
bit ``8 r + i`` is the weight of output channel ``g + 8 r`` and input channel ``8 t + i``. The codes that are left
follow each other in the order of steps, lanes and bits; so the codes before a weight's are as many as bits are set
before its own (Fan et al.: "SpInfer", EuroSys 2025, has that idea for 16-bit weights).

A code is stored as its lower 4 bits, exclusive or those of its group's zero-point: what is not there is a zero then,
and what is there is none.

Stored as ``weight_bitmap`` int32 [row tiles, inputs / 32, 32], ``weight_kept`` int32 [lines, 4] (each block's codes
begin a line of 16 bytes, the first code in the lowest bits), ``weight_starts`` int32 [row tiles * blocks + 1] (the line
where each block's begin, and how many there are), and ``weight_scale`` and ``weight_zero_point`` as a grid's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.grid_codes import GridCodes, GridForm, group_range
from quant_methods.formats.parts.part import (
    Bulk,
    BulkForm,
    Draw,
    Part,
    Range,
    Shapes,
    Stored,
    expect_one_of,
    slow_on_cuda,
)

if TYPE_CHECKING:
    from quant_methods.formats.quantized import QuantizedLinear

BITS = 4
"""Of a code."""
TILE_ROWS, STEP, BLOCK = 32, 32, 128
"""Output channels of a tile; input channels of a word of the bitmap in each of its lanes, and of a block."""
LINE = 32
"""Codes in 16 bytes."""
RANDOM_SHARE = 0.5
"""Of weights that are zero in a random layer."""
_AT_ONCE = 1 << 24
"""Weights that are packed or read at once."""


@dataclass
class BitmapCodes(Bulk):
    """A bitmap and the codes that are left.

    Attributes:
        bitmap: int32 [ceil(out / 32), in / 32, 32], a bit for each weight.
        kept: int32 [lines, 4], codes.
        starts: int32 [tiles * blocks + 1], lines.
        scale: [out, groups] in the stored dtype.
        zero_point: int8 [out, groups]; zeros on a symmetric grid.
        symmetric: zero-points are zeros, and not stored.

    """

    kind: ClassVar[str] = "bitmap"
    what: ClassVar[str] = "codes with a bitmap"
    learns: ClassVar[tuple[str, ...]] = ("scale",)

    bitmap: Tensor
    kept: Tensor
    starts: Tensor
    scale: Tensor
    zero_point: Tensor
    symmetric: bool = False

    @classmethod
    def of(cls, grid: GridCodes) -> BitmapCodes:
        """Return the same weight without its zeros.

        Raises:
            ParetoError: its codes are not of 4 bits, 32 does not divide its input channels, or a zero-point is no code
                of the grid, so that no code there means zero.

        """
        if grid.bits != BITS:
            raise ParetoError(f"codes of {grid.bits} bits; a bitmap goes with codes of {BITS}")
        if grid.shape[1] % STEP:
            raise ParetoError(f"{grid.shape[1]} input channels; a bitmap has multiples of {STEP}")
        half = 1 << (BITS - 1)
        if grid.zero_point.numel() and not -half <= int(grid.zero_point.min()) <= int(grid.zero_point.max()) < half:
            raise ParetoError(f"zero-points that are no codes of {BITS} bits, so that nothing there can be zero")
        width, size = grid.shape[1], grid.shape[1] // grid.scale.shape[1]
        tiles, blocks = -(-grid.shape[0] // TILE_ROWS), -(-width // BLOCK)
        bitmap = torch.empty(tiles, width // STEP, 32, dtype=torch.int32, device=grid.device)
        kept, counts = [], []
        for rows in _some_tiles(tiles, width):
            own = slice(rows.start * TILE_ROWS, rows.stop * TILE_ROWS)
            zero = grid.zero_point[own].repeat_interleave(size, 1)
            stored = _in_order((grid.codes[own] ^ zero) & 15)
            bitmap[rows] = _packed(stored != 0, 1)
            words, lines = _lines(stored)
            kept.append(words)
            counts.append(lines)
        lines = torch.cat(counts).flatten()
        assert len(lines) == tiles * blocks
        starts = functional.pad(lines.cumsum(0), (1, 0)).int()
        return cls(bitmap, torch.cat(kept), starts, grid.scale, grid.zero_point, grid.symmetric)

    @property
    def bits(self) -> int:  # type: ignore[override]  # of the base's attribute, nothing but reading is used
        """Of a code."""
        return BITS

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.scale.shape[0], self.bitmap.shape[1] * STEP

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.bitmap.device

    @property
    def blocks(self) -> int:
        """Blocks of a row tile."""
        return -(-self.bitmap.shape[1] * STEP // BLOCK)

    def grid(self) -> GridCodes:
        """Return the same weight as codes of all of it."""
        (rows, width), codes = self.shape, torch.empty(self.shape, dtype=torch.int8, device=self.device)
        size, places = width // self.scale.shape[1], torch.arange(STEP, device=self.device)
        ends = self.starts.tolist()
        for some in _some_tiles(len(self.bitmap), width):
            present = (self.bitmap[some, :, :, None] >> places & 1).bool()
            words = self.kept[ends[some.start * self.blocks] : ends[some.stop * self.blocks]]
            nibbles = (words[:, :, None] >> torch.arange(0, 32, BITS, device=self.device) & 15).flatten().to(torch.int8)
            stored = torch.zeros(present.shape, dtype=torch.int8, device=self.device)
            # The codes that fill a block's last line are zeros, and no others are.
            stored[present] = nibbles[nibbles != 0]
            own = slice(some.start * TILE_ROWS, min(some.stop * TILE_ROWS, rows))
            found = _by_channel(stored)[: own.stop - own.start]
            zero = self.zero_point[own].repeat_interleave(size, 1)
            # Of the lower four bits, the highest is the sign.
            codes[own] = (((found ^ zero) & 15) ^ 8) - 8
        return GridCodes(codes, self.scale, self.zero_point, BITS, self.symmetric)

    def read(self) -> Tensor:
        """Return the float32 weight [out, in]: ``(code - zero_point) * scale``, and zeros."""
        return self.grid().read()

    def without(self, channels: Tensor) -> tuple[BitmapCodes, Tensor | None]:
        """Make input channels zeros; see :class:`Bulk`."""
        return BitmapCodes.of(self.grid().without(channels)[0]), None

    def stacks_with(self, other: Bulk) -> bool:
        """Return whether both have the same groups, and rows that fill their tiles."""
        return (
            isinstance(other, BitmapCodes)
            and self.scale.shape[1] == other.scale.shape[1]
            and not any(len(codes.scale) % TILE_ROWS for codes in (self, other))
        )

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        tensors = {
            "weight_bitmap": self.bitmap,
            "weight_kept": self.kept,
            "weight_starts": self.starts,
            "weight_scale": self.scale,
        }
        return tensors if self.symmetric else tensors | {"weight_zero_point": self.zero_point}

    def cut(self, rows: Range, inputs: Range) -> BitmapCodes:
        """Return some channels; the codes of whole blocks are found and stay as they are, others are packed again.

        Raises:
            ParetoError: the input channels begin or end inside a group.

        """
        (top, bottom), (left, right) = rows, inputs
        height, width = self.shape
        within = top % TILE_ROWS or left % BLOCK
        if within or (bottom % TILE_ROWS and bottom != height) or (right % BLOCK and right != width):
            return BitmapCodes.of(self.grid().cut(rows, inputs))
        groups = group_range(self.scale.shape[1], width, inputs)
        tiles, across = slice(top // TILE_ROWS, -(-bottom // TILE_ROWS)), slice(left // BLOCK, -(-right // BLOCK))
        grid = len(self.bitmap), self.blocks
        begin, lines = (some.view(grid)[tiles, across].flatten() for some in (self.starts[:-1], self.starts.diff()))
        starts = functional.pad(lines.cumsum(0), (1, 0))
        index = torch.arange(int(starts[-1]), device=self.device) + (begin - starts[:-1]).repeat_interleave(lines)
        return BitmapCodes(
            self.bitmap[tiles, left // STEP : right // STEP],
            self.kept[index],
            starts.int(),
            self.scale[top:bottom, groups],
            self.zero_point[top:bottom, groups],
            self.symmetric,
        )

    @classmethod
    def stack(cls, layers: Sequence[QuantizedLinear]) -> BitmapCodes:
        """Return the codes of layers on top of each other, of which each stacks with each."""
        parts = [layer.part(cls) for layer in layers]
        starts, first = [parts[0].starts[:1]], 0
        for part in parts:
            starts.append(part.starts[1:] + first)
            first += len(part.kept)
        return dataclasses.replace(super().stack(layers), starts=torch.cat(starts).int())


def _some_tiles(tiles: int, width: int) -> Iterator[slice]:
    """Yield the row tiles of a weight of that many input channels, some at a time."""
    at_once = max(_AT_ONCE // (TILE_ROWS * width), 1)
    for first in range(0, tiles, at_once):
        yield slice(first, min(first + at_once, tiles))


def _in_order(values: Tensor) -> Tensor:
    """Return [rows, inputs] in the bitmap's order, [row tiles, steps, lanes, bits]; rows that fill tiles are zeros."""
    padded = functional.pad(values, (0, 0, 0, -len(values) % TILE_ROWS))
    # Axes: tile, r, g, step, t, i.
    split = padded.reshape(-1, 4, 8, padded.shape[1] // STEP, 4, 8)
    return split.permute(0, 3, 2, 4, 1, 5).reshape(len(split), -1, 32, 32)


def _by_channel(values: Tensor) -> Tensor:
    """Return the inverse of :func:`_in_order`, [32 * row tiles, inputs]."""
    split = values.unflatten(3, (4, 8)).unflatten(2, (8, 4))
    return split.permute(0, 4, 2, 1, 3, 5).reshape(len(values) * TILE_ROWS, -1)


def _packed(values: Tensor, width: int) -> Tensor:
    """Return int32 [...] of values [..., 32 / width] of that many bits, the first in the lowest ones."""
    places = torch.arange(0, 32, width, dtype=torch.int32, device=values.device)
    # The places do not overlap, so the sum sets their bits; int32 wraps around into the sign bit as it should.
    return (values.int() << places).sum(-1, dtype=torch.int32)


def _lines(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes that are not zero, int32 [lines, 4], and each block's lines, int64 [row tiles, blocks].

    Args:
        stored: int8 [row tiles, steps, lanes, bits].

    """
    steps = BLOCK // STEP
    blocks = functional.pad(stored, (0, 0, 0, 0, 0, -stored.shape[1] % steps)).unflatten(1, (-1, steps)).flatten(2)
    present = blocks != 0
    counts = present.sum(2)
    lines = -(-counts // LINE)
    # Of the places in each block's lines, those behind its last code hold zeros.
    places = torch.arange(LINE * int(lines.max()), device=stored.device)
    there = (places < counts.view(-1, 1))[places < LINE * lines.view(-1, 1)]
    codes = torch.zeros(len(there), dtype=torch.int8, device=stored.device)
    codes[there] = blocks[present]
    return _packed(codes.view(-1, 4, 32 // BITS), BITS), lines


@dataclass(frozen=True)
class BitmapForm(BulkForm):
    """How codes with a bitmap are stored.

    Attributes:
        bits: of a code, 4.
        group_size: input channels that share a scale; -1 for one scale per output channel.
        symmetric: without zero-points.

    """

    part: ClassVar[type[Part]] = BitmapCodes

    bits: int = BITS
    group_size: int = -1
    symmetric: bool = True

    def check(self, where: str) -> None:
        """Refuse bits other than 4, and groups of no size."""
        super().check(where)
        expect_one_of(where, "bits", self.bits, (BITS,))
        self.grid.check(where)

    @property
    def grid(self) -> GridForm:
        """How the same grid is stored with codes of all weights."""
        return GridForm(self.bits, self.group_size, self.symmetric)

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name; how many codes there are, only they say."""
        tiles = -(-rows // TILE_ROWS)
        scales = {name: what for name, what in self.grid.tensors(rows, inputs).items() if "plane" not in name}
        return {
            "weight_bitmap": Stored((tiles, inputs // STEP, 32), torch.int32),
            "weight_kept": Stored((-1, 4), torch.int32),
            "weight_starts": Stored((tiles * -(-inputs // BLOCK) + 1,), torch.int32),
            **scales,
        }

    @classmethod
    def found(cls, shapes: Shapes) -> BitmapForm | None:
        """Return the form of codes with a bitmap; a group as wide as the layer is a whole row."""
        if not {"weight_bitmap", "weight_scale"} <= shapes.keys():
            return None
        groups = shapes["weight_scale"][1]
        size = -1 if groups == 1 else cls.size(shapes)[1] // groups
        return cls(BITS, size, "weight_zero_point" not in shapes)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        """Return the weight's output and input channels."""
        return shapes["weight_scale"][0], shapes["weight_bitmap"][1] * STEP

    def unpack(self, tensors: Mapping[str, Tensor]) -> BitmapCodes:
        """Return the codes; see :class:`PartForm`.

        Raises:
            ParetoError: the lines of codes are not those that the bitmap counts.

        """
        bitmap, kept, starts, scale = (tensors[f"weight_{name}"] for name in ("bitmap", "kept", "starts", "scale"))
        zero = tensors.get("weight_zero_point")
        if zero is None:
            zero = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
        found = BitmapCodes(bitmap, kept, starts, scale, zero, self.symmetric)
        if not torch.equal(_starts(bitmap), starts) or int(starts[-1]) != len(kept):
            counted = "weight_starts and weight_kept are not what weight_bitmap counts"
            raise ParetoError(f"{counted}; the checkpoint is damaged")
        return found

    def random(self, rows: int, inputs: int, draw: Draw) -> BitmapCodes:
        """Return random codes, of which ``RANDOM_SHARE`` are zeros; see :class:`PartForm`."""
        grid = self.grid.random(rows, inputs, draw)
        zeros = torch.rand(rows, inputs, device=draw.device) < RANDOM_SHARE
        size = inputs // grid.scale.shape[1]
        grid.codes = torch.where(zeros, grid.zero_point.repeat_interleave(size, 1), grid.codes)
        return BitmapCodes.of(grid)

    def slow_on_cuda(self) -> str | None:
        """Say that groups of which 32 does not divide the channels have no CUDA kernel; see :class:`BulkForm`."""
        if self.group_size > 0 and self.group_size % 32:
            return slow_on_cuda(
                f"codes with a bitmap in groups of {self.group_size}", self.bits, "use groups of 32, 64 or 128"
            )
        return None


def _starts(bitmap: Tensor) -> Tensor:
    """Return where each block's lines begin by what a bitmap counts, int32 [row tiles * blocks + 1]."""
    counts = sum((bitmap >> place & 1 for place in range(32)), torch.zeros_like(bitmap)).sum(2)
    padded = functional.pad(counts, (0, -counts.shape[1] % (BLOCK // STEP)))
    lines = -(-padded.unflatten(1, (-1, BLOCK // STEP)).sum(2).flatten() // LINE)
    return functional.pad(lines.cumsum(0), (1, 0)).int()
