"""Codes of a trellis (QTIP, ``trellis.py``): a stream of bits for a tile of 32 x 8 weights, a scale for each group.

Stored as ``weight_trellis`` int32 [row tiles, inputs / 8, 8 * bits] and ``weight_scale`` [rows, groups] in 16 bits.
Rows that do not fill the last tiles have no scales, and what their weights mean does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import expand
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
from quant_methods.formats.parts.trellis import TILE_CHANNELS, TILE_ROWS, matrix_of, pair_values, states_of

BITS = (2, 3, 4)
"""A weight's, of which there are streams."""
_AT_ONCE = 1 << 16
"""Tiles that are read at once: a layer's states are 32 times its words."""


@dataclass
class TrellisCodes(Bulk):
    """Streams of a trellis.

    Attributes:
        words: int32 [ceil(out / 32), in / 8, 8 * bits], the tiles' streams (``trellis.words_of``).
        scale: [out, groups] in the stored dtype, by which a group's values are multiplied.

    """

    kind: ClassVar[str] = "trellis"
    what: ClassVar[str] = "a trellis code"
    learns: ClassVar[tuple[str, ...]] = ("scale",)

    words: Tensor
    scale: Tensor

    @property
    def bits(self) -> int:  # type: ignore[override]  # of the base's attribute, nothing but reading is used
        """Of a weight."""
        return self.words.shape[2] // 8

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.scale.shape[0], self.words.shape[1] * TILE_CHANNELS

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.words.device

    def pairs(self) -> Tensor:
        """Return what the streams mean without scales, float32 [out, in]."""
        values = pair_values(self.device)
        at_once = max(_AT_ONCE // self.words.shape[1], 1)
        parts = [matrix_of(values[states_of(some, self.bits)]) for some in self.words.split(at_once)]
        return torch.cat(parts)[: len(self.scale)]

    def read(self) -> Tensor:
        """Return the float32 weight [out, in], each pair's values times their groups' scales."""
        return self.pairs() * expand(self.scale.float(), self.shape[1])

    def without(self, channels: Tensor) -> tuple[TrellisCodes, Tensor | None]:
        """Return the same codes, and what they mean in some input channels: a stream cannot be made to mean zeros."""
        return self, self.read()[:, channels]

    def stacks_with(self, other: Bulk) -> bool:
        """Return whether both have the same bits and groups, and rows that fill their tiles."""
        return (
            isinstance(other, TrellisCodes)
            and (self.bits, self.scale.shape[1]) == (other.bits, other.scale.shape[1])
            and not any(len(codes.scale) % TILE_ROWS for codes in (self, other))
        )

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        return {"weight_trellis": self.words, "weight_scale": self.scale}

    def cut(self, rows: Range, inputs: Range) -> TrellisCodes:
        """Return the codes of some channels.

        Raises:
            ParetoError: they begin or end inside a tile, or input channels inside a group.

        """
        (top, bottom), (left, right) = rows, inputs
        (height, width), groups = self.shape, self.scale.shape[1]
        size = TILE_CHANNELS if groups == 1 else width // groups
        if top % TILE_ROWS or (bottom % TILE_ROWS and bottom != height):
            raise ParetoError(
                f"tensor parallelism would cut a layer of {height} output channels inside a trellis code's tiles of "
                f"{TILE_ROWS}; use fewer ranks, or compress to a grid"
            )
        if left % size or right % size:
            what = "a trellis code's tiles" if groups == 1 else "its groups"
            raise ParetoError(
                f"tensor parallelism would cut a layer of {width} input channels inside {what} of {size}; use fewer "
                "ranks, or a checkpoint with smaller groups"
            )
        words = self.words[top // TILE_ROWS : -(-bottom // TILE_ROWS), left // TILE_CHANNELS : right // TILE_CHANNELS]
        kept = slice(0, 1) if groups == 1 else slice(left // size, right // size)
        return TrellisCodes(words, self.scale[top:bottom, kept])


@dataclass(frozen=True)
class TrellisForm(BulkForm):
    """How codes of a trellis are stored.

    Attributes:
        bits: of a weight, 2 to 4.
        group_size: input channels that share a scale, a multiple of 8; -1 for one scale per output channel.

    """

    part: ClassVar[type[Part]] = TrellisCodes

    bits: int
    group_size: int = -1

    def check(self, where: str) -> None:
        """Refuse bits that there are no streams of, and groups that are not whole tiles."""
        super().check(where)
        expect_one_of(where, "bits", self.bits, BITS)
        if self.group_size != -1 and (self.group_size < 1 or self.group_size % TILE_CHANNELS):
            raise ParetoError(f"{where}: group_size is {self.group_size}, expected -1 or a multiple of {TILE_CHANNELS}")

    def groups(self, inputs: int) -> int:
        """Return the groups of a row."""
        return 1 if self.group_size == -1 else inputs // self.group_size

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name."""
        words = (-(-rows // TILE_ROWS), inputs // TILE_CHANNELS, 8 * self.bits)
        return {"weight_trellis": Stored(words, torch.int32), "weight_scale": Stored((rows, self.groups(inputs)))}

    @classmethod
    def found(cls, shapes: Shapes) -> TrellisForm | None:
        """Return the form of streams; a group as wide as the layer is a whole row."""
        if not {"weight_trellis", "weight_scale"} <= shapes.keys():
            return None
        groups = shapes["weight_scale"][1]
        return cls(shapes["weight_trellis"][2] // 8, -1 if groups == 1 else cls.size(shapes)[1] // groups)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        """Return the weight's output and input channels."""
        return shapes["weight_scale"][0], shapes["weight_trellis"][1] * TILE_CHANNELS

    def unpack(self, tensors: Mapping[str, Tensor]) -> TrellisCodes:
        """Return the codes; see :class:`PartForm`."""
        return TrellisCodes(tensors["weight_trellis"], tensors["weight_scale"])

    def random(self, rows: int, inputs: int, draw: Draw) -> TrellisCodes:
        """Return random codes, of which every word is one; see :class:`PartForm`."""
        tiles, across, words = self.tensors(rows, inputs)["weight_trellis"].shape
        return TrellisCodes(
            draw.integers(-128, 128, tiles, across, 4 * words).view(torch.int32),
            draw.uniform(rows, self.groups(inputs)),
        )

    def slow_on_cuda(self) -> str | None:
        """Say that groups of which 32 does not divide the channels have no CUDA kernel; see :class:`BulkForm`."""
        if self.group_size > 0 and self.group_size % 32:
            return slow_on_cuda(
                f"trellis codes in groups of {self.group_size}", self.bits, "use groups of 32, 64 or 128"
            )
        return None
