"""Weights of 2 to 4 bits in a trellis code, with a scale for each group of channels (``trellis.py``).

Stored as ``weight_trellis`` int32 [rows / 32, inputs / 8, 8 x bits], the tiles' streams, and ``weight_scale`` [rows,
groups] in 16 bits, by which a tile's pairs are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.part import Bulk, BulkForm, Draw, Part, Range, Shapes, Stored, expect_one_of
from quant_methods.formats.parts.trellis import (
    TILE_CHANNELS,
    TILE_ROWS,
    matrix_of,
    pair_values,
    states_of,
)

if TYPE_CHECKING:
    from quant_methods.formats.quantized import QuantizedLinear

BITS = (2, 3, 4)
_AT_ONCE = 1 << 16
"""Tiles that are read at once: a layer's states are 32 times its words."""


@dataclass
class TrellisCodes(Bulk):
    """Streams of a trellis code.

    Attributes:
        words: int32 [out / 32, in / 8, 8 * bits], the tiles' streams.
        scale: [out, groups] in the stored dtype.

    """

    kind: ClassVar[str] = "trellis"
    what: ClassVar[str] = "a trellis code"
    learns: ClassVar[tuple[str, ...]] = ("scale",)

    words: Tensor
    scale: Tensor

    @property
    def bits(self) -> int:  # type: ignore[override]  # of the base's attribute, nothing but reading is used
        """A weight."""
        return self.words.shape[2] // 8

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.words.shape[0] * TILE_ROWS, self.words.shape[1] * TILE_CHANNELS

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.words.device

    def pairs(self) -> Tensor:
        """Return what the streams mean without scales, float32 [out, in]."""
        values = pair_values(self.device)
        at_once = max(_AT_ONCE // self.words.shape[1], 1)
        parts = [matrix_of(values[states_of(some, self.bits)]) for some in self.words.split(at_once)]
        return torch.cat(parts)

    def read(self) -> Tensor:
        """Return the float32 weight [out, in]."""
        pairs = self.pairs()
        pairs.unflatten(1, (self.scale.shape[1], -1)).mul_(self.scale.float()[:, :, None])
        return pairs

    def without(self, channels: Tensor) -> tuple[TrellisCodes, Tensor | None]:
        """Return the same streams, and what they mean in some input channels: no stream holds zeros in these alone."""
        return self, self.read()[:, channels]

    def stacks_with(self, other: Bulk) -> bool:
        """Return whether both have the same bits and groups."""
        return (
            isinstance(other, TrellisCodes) and self.bits == other.bits and self.scale.shape[1] == other.scale.shape[1]
        )

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        return {"weight_trellis": self.words, "weight_scale": self.scale}

    def cut(self, rows: Range, inputs: Range) -> TrellisCodes:
        """Return the streams of some channels.

        Raises:
            ParetoError: the channels begin or end inside a tile or a group.

        """
        (top, bottom), (left, right) = rows, inputs
        (out, width), groups = self.shape, self.scale.shape[1]
        size = width // groups if groups > 1 else TILE_CHANNELS
        if top % TILE_ROWS or bottom % TILE_ROWS or left % size or right % size:
            raise ParetoError(
                f"tensor parallelism would cut a layer of {out} x {width} channels inside its tiles of {TILE_ROWS} "
                f"output channels or its groups of {size} input channels; use fewer ranks"
            )
        group_range = slice(left // size, right // size) if groups > 1 else slice(0, 1)
        return TrellisCodes(
            self.words[top // TILE_ROWS : bottom // TILE_ROWS, left // TILE_CHANNELS : right // TILE_CHANNELS],
            self.scale[top:bottom, group_range],
        )

    @classmethod
    def stack(cls, layers: Sequence[QuantizedLinear]) -> TrellisCodes:
        """Return the streams of layers on top of each other, which have the same bits and groups."""
        parts = [layer.part(cls) for layer in layers]
        return cls(torch.cat([part.words for part in parts]), torch.cat([part.scale for part in parts]))


@dataclass(frozen=True)
class TrellisForm(BulkForm):
    """How streams are stored.

    Attributes:
        bits: of a weight, 2 to 4.
        group_size: input channels that share a scale; -1 for one scale per output channel.

    """

    part: ClassVar[type[Part]] = TrellisCodes

    bits: int
    group_size: int = -1

    def check(self, where: str) -> None:
        """Refuse bits that there is no code for, and groups that cut tiles."""
        super().check(where)
        expect_one_of(where, "bits", self.bits, BITS)
        if self.group_size != -1 and (self.group_size < 1 or self.group_size % TILE_CHANNELS):
            raise ParetoError(f"{where}: group_size is {self.group_size}, expected -1 or a multiple of {TILE_CHANNELS}")

    def groups(self, inputs: int) -> int:
        """Return the groups of a row."""
        return 1 if self.group_size == -1 else inputs // self.group_size

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name."""
        tiles = (rows // TILE_ROWS, inputs // TILE_CHANNELS, 8 * self.bits)
        return {
            "weight_trellis": Stored(tiles, torch.int32),
            "weight_scale": Stored((rows, self.groups(inputs))),
        }

    @classmethod
    def found(cls, shapes: Shapes) -> TrellisForm | None:
        """Return the form of streams with scales; a group as wide as the layer is a whole row."""
        if "weight_trellis" not in shapes:
            return None
        groups = shapes["weight_scale"][1]
        return cls(shapes["weight_trellis"][2] // 8, -1 if groups == 1 else cls.size(shapes)[1] // groups)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        """Return the weight's output and input channels."""
        rows, channels, _ = shapes["weight_trellis"]
        return rows * TILE_ROWS, channels * TILE_CHANNELS

    def unpack(self, tensors: Mapping[str, Tensor]) -> TrellisCodes:
        """Return the streams; see :class:`PartForm`."""
        return TrellisCodes(tensors["weight_trellis"], tensors["weight_scale"])

    def random(self, rows: int, inputs: int, draw: Draw) -> TrellisCodes:
        """Return random streams; see :class:`PartForm`."""
        tiles = rows // TILE_ROWS, inputs // TILE_CHANNELS, 8 * self.bits
        words = torch.randint(-(1 << 31), 1 << 31, tiles, device=draw.device, dtype=torch.int64).int()
        return TrellisCodes(words, draw.uniform(rows, self.groups(inputs)) / 4)

    def slow_on_cuda(self) -> str | None:
        """Say nothing: a kernel multiplies by all of them; see :class:`BulkForm`."""
        return None
