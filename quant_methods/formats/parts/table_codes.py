"""Codes that are indices into a look-up table of each output channel (SqueezeLLM).

Stored as bit planes (``planes.py``) and ``weight_table`` [rows, 2^bits] in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
    packed_planes,
    plane_size,
    plane_tensors,
    plane_widths,
    unpacked_planes,
)


@dataclass
class TableCodes(Bulk):
    """Indices into tables.

    Attributes:
        codes: int8 [out, in], from 0.
        table: [out, 2^bits] in the stored dtype, what each index of an output channel means.

    """

    kind: ClassVar[str] = "table"
    what: ClassVar[str] = "a table"
    learns: ClassVar[tuple[str, ...]] = ("table",)
    of_rows: ClassVar[str] = "table"

    codes: Tensor
    table: Tensor

    @property
    def bits(self) -> int:  # type: ignore[override]  # of the base's attribute, nothing but reading is used
        """Of a code."""
        return self.table.shape[1].bit_length() - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    def read(self) -> Tensor:
        """Return the float32 weight [out, in], the entries that the codes name."""
        return self.table.float().gather(1, self.codes.long())

    def without(self, channels: Tensor) -> tuple[TableCodes, Tensor | None]:
        """Return the same codes, and what they mean in some input channels: a table need not hold a zero."""
        return self, self.table.float().gather(1, self.codes[:, channels].long())

    def stacks_with(self, other: Bulk) -> bool:
        """Return whether both have the same bits."""
        return isinstance(other, TableCodes) and self.bits == other.bits

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores; see :func:`packed_planes` for what is refused."""
        return packed_planes(self.codes.int(), self.bits) | {"weight_table": self.table}

    def cut(self, rows: Range, inputs: Range) -> TableCodes:
        """Return the codes of some channels."""
        return TableCodes(self.codes[slice(*rows), slice(*inputs)], self.table[slice(*rows)])


@dataclass(frozen=True)
class TableForm(BulkForm):
    """How codes with tables are stored.

    Attributes:
        bits: of a code, 2 to 7.

    """

    part: ClassVar[type[Part]] = TableCodes

    bits: int

    def check(self, where: str) -> None:
        """Refuse bits that there are no tables for."""
        super().check(where)
        expect_one_of(where, "bits", self.bits, range(2, 8))

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name."""
        return plane_tensors(self.bits, rows, inputs) | {"weight_table": Stored((rows, 1 << self.bits))}

    @classmethod
    def found(cls, shapes: Shapes) -> TableForm | None:
        """Return the form of codes with a table."""
        widths = plane_widths(shapes)
        return cls(sum(widths)) if widths and "weight_table" in shapes else None

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        """Return the weight's output and input channels."""
        return plane_size(shapes)

    def unpack(self, tensors: Mapping[str, Tensor]) -> TableCodes:
        """Return the codes; see :class:`PartForm`."""
        return TableCodes(unpacked_planes(tensors, self.bits).to(torch.int8), tensors["weight_table"])

    def random(self, rows: int, inputs: int, draw: Draw) -> TableCodes:
        """Return random codes; see :class:`PartForm`."""
        codes = draw.integers(0, 1 << self.bits, rows, inputs)
        return TableCodes(codes, draw.uniform(rows, 1 << self.bits))

    def slow_on_cuda(self) -> str | None:
        """Say that tables of more than 4 bits have no CUDA kernel; see :class:`BulkForm`."""
        if self.bits > 4:
            return slow_on_cuda("look-up weights", self.bits, "compress to tables of 3 or 4 bits, or round to a grid")
        return None
