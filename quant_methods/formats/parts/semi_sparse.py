"""Codes of 4 bits of which two in four are kept: semi-structured (2:4) sparsity on a grid.

Of each four neighbouring input channels a row keeps two weights, as codes on a grid (``grid_codes.py``) with their
places; the two others are zero. So four weights take two codes and two places of 2 bits: 3 bits a weight, and scales.

Stored as ``weight_kept`` int32 [rows, inputs / 16], the kept codes plus 8, eight in a word, and ``weight_place`` int32
[rows, inputs / 32], a nibble for each four channels: the place of the first kept weight in its lower two bits, above it
that of the second, which is larger. In both the first ones have the lowest bits. The nibbles are the metadata that
sparse tensor cores take (PTX ISA, ``mma.sp``). Scales and zero-points are those of a grid: groups count all channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import expand
from quant_methods.formats.parts.grid_codes import GridCodes, group_range
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
from quant_methods.formats.parts.planes import INPUT_MULTIPLE, pack_codes, unpack_codes

BITS = (4,)
"""A kept code's."""
AMONG = 4
"""Neighbouring input channels of which two are kept."""
NIBBLES = (4, 8, 12, 9, 13, 14)
"""Two places in rising order, ``first | second << 2``: all there are."""
_REFUSED = 0
_NIBBLE_OF = (4, 4, 4, 4, 8, 8, 9, _REFUSED, 12, 12, 13, _REFUSED, 14, _REFUSED, _REFUSED, _REFUSED)
"""The nibble for each set of channels (a bit each) that hold something; where that is fewer than two, zeros fill up."""


@dataclass
class SemiSparseCodes(Bulk):
    """Kept codes and their places.

    Attributes:
        codes: int8 [out, in / 2], signed.
        places: uint8 [out, in / 4], one of ``NIBBLES`` each.
        scale: [out, groups] in the stored dtype.
        zero_point: int8 [out, groups]; zeros on a symmetric grid.
        bits: of a code, 4.
        symmetric: zero-points are zeros, and not stored.

    """

    kind: ClassVar[str] = "semi_sparse"
    what: ClassVar[str] = "2:4 codes on a grid"
    learns: ClassVar[tuple[str, ...]] = ("scale",)

    codes: Tensor
    places: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool = False

    @classmethod
    def of(cls, grid: GridCodes) -> SemiSparseCodes:
        """Return the same weight as codes on a grid has, of which two or more in each four neighbours are zero.

        Raises:
            ParetoError: more than two are not, the channels are not whole fours, or where fewer than two are left the
                grid has no code for zero.

        """
        width = grid.codes.shape[1]
        if width % AMONG:
            raise ParetoError(f"{width} input channels, which are not whole fours as 2:4 codes want them")
        held = (grid.codes != expand(grid.zero_point, width)).to(torch.uint8).unflatten(1, (-1, AMONG))
        sets = held[..., 0] | held[..., 1] << 1 | held[..., 2] << 2 | held[..., 3] << 3
        places = torch.tensor(_NIBBLE_OF, dtype=torch.uint8, device=held.device)[sets.int()]
        if more := int((places == _REFUSED).sum()):
            raise ParetoError(
                f"{more} of {places.numel()} fours of neighbouring weights hold more than two that are not zero; prune "
                "with pattern 2:4 before, or store: dense"
            )
        codes = grid.codes.unflatten(1, (-1, AMONG)).gather(2, _indices(places)).flatten(1)
        half = 1 << (grid.bits - 1)
        if codes.min() < -half or codes.max() >= half:
            raise ParetoError("where fewer than two of four weights are kept, the grid has no code for zero")
        return cls(codes, places, grid.scale, grid.zero_point, grid.bits, grid.symmetric)

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.codes.shape[0], AMONG * self.places.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    def grid(self) -> GridCodes:
        """Return the same weight as codes of all of it."""
        zeros = expand(self.zero_point, self.shape[1]).unflatten(1, (-1, AMONG))
        codes = zeros.scatter(2, _indices(self.places), self.codes.unflatten(1, (-1, 2))).flatten(1)
        return GridCodes(codes, self.scale, self.zero_point, self.bits, self.symmetric)

    def read(self) -> Tensor:
        """Return the float32 weight [out, in]: ``(code - zero_point) * scale`` in the places kept, else zero."""
        return self.grid().read()

    def without(self, channels: Tensor) -> tuple[SemiSparseCodes, Tensor | None]:
        """Give input channels the code that reads as zero; see :class:`Bulk`."""
        left_out = torch.zeros(self.shape[1], dtype=torch.bool, device=self.device)
        left_out[channels] = True
        held = left_out.view(1, -1, AMONG).expand(self.shape[0], -1, -1).gather(2, _indices(self.places)).flatten(1)
        codes = torch.where(held, expand(self.zero_point, self.codes.shape[1]), self.codes)
        return SemiSparseCodes(codes, self.places, self.scale, self.zero_point, self.bits, self.symmetric), None

    def stacks_with(self, other: Bulk) -> bool:
        """Return whether both have the same groups."""
        return isinstance(other, SemiSparseCodes) and (self.bits, self.scale.shape[1]) == (
            other.bits,
            other.scale.shape[1],
        )

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores.

        Raises:
            ParetoError: the input channels are no multiple of 32, or a code needs more bits.

        """
        if self.shape[1] % INPUT_MULTIPLE:
            raise ParetoError(f"{self.shape[1]} input channels; this format holds multiples of {INPUT_MULTIPLE}")
        unsigned = self.codes.int() + (1 << (self.bits - 1))
        if unsigned.min() < 0 or unsigned.max() >> self.bits:
            raise ParetoError(f"codes that do not fit into {self.bits} bits")
        tensors = {
            "weight_kept": pack_codes(unsigned, self.bits)[self.bits],
            "weight_place": pack_codes(self.places, 4)[4],
            "weight_scale": self.scale,
        }
        return tensors if self.symmetric else {**tensors, "weight_zero_point": self.zero_point}

    def cut(self, rows: Range, inputs: Range) -> SemiSparseCodes:
        """Return the codes of some channels.

        Raises:
            ParetoError: the input channels begin or end inside a group, or inside four neighbours.

        """
        (top, bottom), (left, right) = rows, inputs
        if left % AMONG or right % AMONG:
            raise ParetoError(
                f"tensor parallelism would cut a layer of {self.shape[1]} input channels inside the four neighbours of "
                "2:4 codes; use fewer ranks, or store: dense"
            )
        groups = group_range(self.scale.shape[1], self.shape[1], inputs)
        return SemiSparseCodes(
            self.codes[top:bottom, left // 2 : right // 2],
            self.places[top:bottom, left // AMONG : right // AMONG],
            self.scale[top:bottom, groups],
            self.zero_point[top:bottom, groups],
            self.bits,
            self.symmetric,
        )


def _indices(places: Tensor) -> Tensor:
    """Return the channel, of four, of each kept weight: int64 [rows, fours, 2]."""
    return torch.stack([places & 3, places >> 2], 2).long()


def unpacked(tensors: Mapping[str, Tensor], bits: int, symmetric: bool) -> SemiSparseCodes:
    """Return the codes that a checkpoint's tensors hold, or some rows of them; the places are not looked at."""
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    if zero is None:
        zero = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
    codes = unpack_codes({bits: tensors["weight_kept"]}, bits).to(torch.int8) - (1 << (bits - 1))
    places = unpack_codes({4: tensors["weight_place"]}, 4)
    return SemiSparseCodes(codes, places, scale, zero, bits, symmetric)


@dataclass(frozen=True)
class SemiSparseForm(BulkForm):
    """How 2:4 codes are stored.

    Attributes:
        bits: of a kept code, 4.
        group_size: input channels, zeros included, that share a scale: a multiple of 4; -1 for one scale per output
            channel.
        symmetric: without zero-points.

    """

    part: ClassVar[type[Part]] = SemiSparseCodes

    bits: int
    group_size: int = -1
    symmetric: bool = True

    def check(self, where: str) -> None:
        """Refuse bits that no code here has, and groups that are not whole fours."""
        super().check(where)
        expect_one_of(where, "bits", self.bits, BITS)
        if self.group_size != -1 and (self.group_size < 1 or self.group_size % AMONG):
            raise ParetoError(f"{where}: group_size is {self.group_size}, expected -1 or a multiple of {AMONG}")

    def groups(self, inputs: int) -> int:
        """Return the groups of a row."""
        return 1 if self.group_size == -1 else inputs // self.group_size

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name."""
        found = {
            "weight_kept": Stored((rows, inputs // 2 * self.bits // 32), torch.int32),
            "weight_place": Stored((rows, inputs // 32), torch.int32),
            "weight_scale": Stored((rows, self.groups(inputs))),
        }
        if not self.symmetric:
            found["weight_zero_point"] = Stored((rows, self.groups(inputs)), torch.int8)
        return found

    @classmethod
    def found(cls, shapes: Shapes) -> SemiSparseForm | None:
        """Return the form of kept codes; a group as wide as the layer is a whole row."""
        if not {"weight_kept", "weight_place", "weight_scale"} <= shapes.keys():
            return None
        inputs, groups = cls.size(shapes)[1], shapes["weight_scale"][1]
        bits = shapes["weight_kept"][1] * 64 // inputs
        return cls(bits, -1 if groups == 1 else inputs // groups, "weight_zero_point" not in shapes)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        """Return the weight's output and input channels."""
        rows, words = shapes["weight_place"]
        return rows, 32 * words

    def unpack(self, tensors: Mapping[str, Tensor]) -> SemiSparseCodes:
        """Return the codes; see :class:`PartForm`.

        Raises:
            ParetoError: places that are not two in rising order.

        """
        codes = unpacked(tensors, self.bits, self.symmetric)
        known = torch.zeros(16, dtype=torch.bool, device=codes.device)
        known[list(NIBBLES)] = True
        if not known[codes.places.int()].all():
            raise ParetoError("weight_place holds places that are not two of four in order; the checkpoint is damaged")
        return codes

    def random(self, rows: int, inputs: int, draw: Draw) -> SemiSparseCodes:
        """Return random codes in random places; see :class:`PartForm`."""
        half, groups = 1 << (self.bits - 1), self.groups(inputs)
        nibbles = torch.tensor(NIBBLES, dtype=torch.uint8, device=draw.device)
        zero = torch.zeros(rows, groups, dtype=torch.int8, device=draw.device)
        if not self.symmetric:
            zero += draw.integers(-1, 2, rows, groups)
        return SemiSparseCodes(
            draw.integers(-half, half, rows, inputs // 2),
            nibbles[draw.integers(0, len(NIBBLES), rows, inputs // AMONG).int()],
            draw.uniform(rows, groups) / half,
            zero,
            self.bits,
            self.symmetric,
        )

    def slow_on_cuda(self) -> str | None:
        """Say that groups of which 32 does not divide the channels have no CUDA kernel; see :class:`BulkForm`."""
        if self.group_size > 0 and self.group_size % 32:
            return slow_on_cuda(f"2:4 codes in groups of {self.group_size}", self.bits, "use groups of 32, 64 or 128")
        return None
