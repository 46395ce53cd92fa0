"""A product of two narrow matrices that is added to the bulk and makes up for its error (ZeroQuant-V2).

Stored as ``low_rank_up`` [rows, rank] and ``low_rank_down`` [rank, inputs] in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.part import Addition, Draw, Part, PartForm, Range, Shapes, Stored

if TYPE_CHECKING:
    from quant_methods.formats.quantized import QuantizedLinear


@dataclass
class LowRank(Addition):
    """A product.

    Attributes:
        up: [out, rank] in the model's 16-bit dtype.
        down: [rank, in], likewise.

    """

    kind: ClassVar[str] = "low_rank"
    what: ClassVar[str] = "a low-rank product"
    learns: ClassVar[tuple[str, ...]] = ("up", "down")
    of_rows: ClassVar[str] = "up"

    up: Tensor
    down: Tensor

    def add(self, weight: Tensor) -> None:
        """Add the product to a weight; see :class:`Addition`."""
        weight += self.up.float() @ self.down.float()

    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        return {"low_rank_up": self.up, "low_rank_down": self.down} if self.up.shape[1] else {}

    def cut(self, rows: Range, inputs: Range) -> LowRank:
        """Return the product of some channels, of the same rank."""
        return LowRank(self.up[slice(*rows)], self.down[:, slice(*inputs)])

    @classmethod
    def stack(cls, layers: Sequence[QuantizedLinear]) -> LowRank:
        """Return the products of layers on top of each other, side by side; some may have none."""
        parts = [layer.get(cls) for layer in layers]
        downs = [part.down for part in parts if part is not None]
        ups = [
            downs[0].new_zeros((layer.shape[0], 0)) if part is None else part.up
            for layer, part in zip(layers, parts, strict=True)
        ]
        return cls(torch.block_diag(*ups).to(downs[0].dtype), torch.cat(downs))


@dataclass(frozen=True)
class LowRankForm(PartForm):
    """How a product is stored.

    Attributes:
        rank: of the product.

    """

    part: ClassVar[type[Part]] = LowRank

    rank: int

    def check(self, where: str) -> None:
        """Refuse a rank that is none."""
        super().check(where)
        if self.rank < 1:
            raise ParetoError(f"{where}: rank is {self.rank}, expected a positive number")

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors by local name."""
        return {"low_rank_up": Stored((rows, self.rank)), "low_rank_down": Stored((self.rank, inputs))}

    @classmethod
    def found(cls, shapes: Shapes) -> LowRankForm | None:
        """Return the form of a product that has its first matrix."""
        return cls(shapes["low_rank_up"][1]) if "low_rank_up" in shapes else None

    def unpack(self, tensors: Mapping[str, Tensor]) -> LowRank:
        """Return the product; see :class:`PartForm`."""
        return LowRank(tensors["low_rank_up"], tensors["low_rank_down"])

    def random(self, rows: int, inputs: int, draw: Draw) -> LowRank:
        """Return a random product; see :class:`PartForm`."""
        return LowRank(draw.uniform(rows, self.rank), draw.uniform(self.rank, inputs))
