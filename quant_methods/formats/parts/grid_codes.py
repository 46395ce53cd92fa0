"""Codes on a grid: a code, a scale and a zero-point for each group of input channels (``formats/grid.py``).

Stored as bit planes of the signed code plus 2^(bits-1) (``planes.py``), ``weight_scale`` [rows, groups] in 16 bits and,
with zero-points, ``weight_zero_point`` int8 [rows, groups], in the numbering of signed codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import dequantize
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
from quant_methods.formats.parts.planes import (
    PLANES,
    packed_planes,
    plane_size,
    plane_tensors,
    plane_widths,
    unpacked_planes,
)


@dataclass
class GridCodes(Bulk):
    """Codes on a grid.

    Attributes:
        codes: int8 [out, in], signed.
        scale: [out, groups] in the stored dtype.
        zero_point: int8 [out, groups]; zeros on a symmetric grid.
        bits: of a code, 2 to 8.
        symmetric: zero-points are zeros, and not stored.

    """

    kind: ClassVar[str] = "grid"
    what: ClassVar[str] = "codes on a grid"
    learns: ClassVar[tuple[str, ...]] = ("scale",)

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    def read(self) -> Tensor:
        """Return the float32 weight [out, in], ``(code - zero_point) * scale``."""
        return dequantize(self.codes, self.scale, self.zero_point)

    def without(self, channels: Tensor) -> tuple[GridCodes, Tensor | None]:
        """Give input channels the code that reads as zero; see :class:`Bulk`."""
        zeros = self.zero_point[:, channels * self.scale.shape[1] // self.codes.shape[1]]
        codes = self.codes.index_copy(1, channels, zeros)
        return GridCodes(codes, self.scale, self.zero_point, self.bits, self.symmetric), None

    def stacks_with(self, other: Bulk) -> bool:
        """Return whether both have the same bits and groups."""
        return isinstance(other, GridCodes) and (self.bits, self.scale.shape[1]) == (other.bits, other.scale.shape[1])

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores; see :func:`packed_planes` for what is refused."""
        tensors = packed_planes(self.codes.int() + (1 << (self.bits - 1)), self.bits)
        tensors["weight_scale"] = self.scale
        if not self.symmetric:
            tensors["weight_zero_point"] = self.zero_point
        return tensors

    def cut(self, rows: Range, inputs: Range) -> GridCodes:
        """Return the codes of some channels.

        Raises:
            ParetoError: the input channels begin or end inside a group.

        """
        (top, bottom), (left, right) = rows, inputs
        groups = group_range(self.scale.shape[1], self.codes.shape[1], inputs)
        return GridCodes(
            self.codes[top:bottom, left:right],
            self.scale[top:bottom, groups],
            self.zero_point[top:bottom, groups],
            self.bits,
            self.symmetric,
        )


def group_range(groups: int, width: int, inputs: Range) -> slice:
    """Return the groups of some of a row's input channels.

    Args:
        groups: of a row.
        width: input channels of a row.
        inputs: those that are wanted.

    Raises:
        ParetoError: they begin or end inside a group.

    """
    (left, right), size = inputs, width // groups
    if groups == 1:
        return slice(0, 1)
    if left % size or right % size:
        raise ParetoError(
            f"tensor parallelism would cut a layer of {width} input channels inside its groups of {size}; use "
            "fewer ranks, or a checkpoint with smaller groups"
        )
    return slice(left // size, right // size)


@dataclass(frozen=True)
class GridForm(BulkForm):
    """How codes on a grid are stored.

    Attributes:
        bits: of a code, 2 to 8.
        group_size: input channels that share a scale; -1 for one scale per output channel.
        symmetric: without zero-points.

    """

    part: ClassVar[type[Part]] = GridCodes

    bits: int
    group_size: int = -1
    symmetric: bool = True

    def check(self, where: str) -> None:
        """Refuse bits that there are no planes for, and groups of no size."""
        super().check(where)
        expect_one_of(where, "bits", self.bits, tuple(PLANES))
        if self.group_size != -1 and self.group_size < 1:
            raise ParetoError(f"{where}: group_size is {self.group_size}, expected -1 or a positive number")

    def groups(self, inputs: int) -> int:
        """Return the groups of a row."""
        return 1 if self.group_size == -1 else inputs // self.group_size

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name."""
        found = plane_tensors(self.bits, rows, inputs)
        found["weight_scale"] = Stored((rows, self.groups(inputs)))
        if not self.symmetric:
            found["weight_zero_point"] = Stored((rows, self.groups(inputs)), torch.int8)
        return found

    @classmethod
    def found(cls, shapes: Shapes) -> GridForm | None:
        """Return the form of codes with scales; a group as wide as the layer is a whole row."""
        widths = plane_widths(shapes)
        if not widths or "weight_scale" not in shapes:
            return None
        groups = shapes["weight_scale"][1]
        size = -1 if groups == 1 else plane_size(shapes)[1] // groups
        return cls(sum(widths), size, "weight_zero_point" not in shapes)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        """Return the weight's output and input channels."""
        return plane_size(shapes)

    def unpack(self, tensors: Mapping[str, Tensor]) -> GridCodes:
        """Return the codes; see :class:`PartForm`."""
        scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
        if zero is None:
            zero = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
        signed = unpacked_planes(tensors, self.bits).to(torch.int16) - (1 << (self.bits - 1))
        return GridCodes(signed.to(torch.int8), scale, zero, self.bits, self.symmetric)

    def random(self, rows: int, inputs: int, draw: Draw) -> GridCodes:
        """Return random codes; see :class:`PartForm`."""
        half, groups = 1 << (self.bits - 1), self.groups(inputs)
        codes = draw.integers(-half, half, rows, inputs)
        zero = torch.zeros(rows, groups, dtype=torch.int8, device=draw.device)
        if not self.symmetric:
            zero += draw.integers(-1, 2, rows, groups)
        return GridCodes(codes, draw.uniform(rows, groups) / half, zero, self.bits, self.symmetric)

    def slow_on_cuda(self) -> str | None:
        """Say that 8 bits with zero-points have no CUDA kernel; see :class:`BulkForm`."""
        if self.bits == 8 and not self.symmetric:
            return slow_on_cuda("weights with zero-points", self.bits, "compress with --symmetric")
        return None
