"""What a weight step makes of a linear layer: the parts that its weight is the sum of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from quant_methods.formats.parts.part import Addition, Bulk, Part
from quant_methods.formats.parts.registry import place

Kind = TypeVar("Kind", bound=Part)


@dataclass(frozen=True, eq=False)
class DenseLinear:
    """A linear layer that was changed and not quantized: a pruned one.

    Attributes:
        weight: [out, in] in the dtype that it is stored in.

    """

    weight: Tensor

    def read(self) -> Tensor:
        """Return the float32 weight [out, in] that serving means."""
        return self.weight.float()


@dataclass(init=False, eq=False)
class QuantizedLinear:
    """A quantized linear layer.

    Attributes:
        parts: one bulk, then what is added to it, in the order of ``parts/registry.py``; no kind twice.
        input_scale: float32 [1], of activations that are rounded to 8 bits with a fixed scale.

    """

    parts: tuple[Part, ...]
    input_scale: Tensor | None

    def __init__(self, *parts: Part, input_scale: Tensor | None = None) -> None:
        places = [place(type(part)) for part in parts]
        assert sum(isinstance(part, Bulk) for part in parts) == 1, "a weight has one bulk"
        assert len(set(places)) == len(places), "a weight has one part of a kind"
        self.parts = tuple(sorted(parts, key=lambda part: place(type(part))))
        self.input_scale = input_scale

    @property
    def bulk(self) -> Bulk:
        """The part that covers the whole weight."""
        return next(part for part in self.parts if isinstance(part, Bulk))

    @property
    def additions(self) -> tuple[Addition, ...]:
        """What is added to the bulk, maybe nothing."""
        return tuple(part for part in self.parts if isinstance(part, Addition))

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.bulk.shape

    def get(self, kind: type[Kind]) -> Kind | None:
        """Return the part of a kind, None if there is none."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    def part(self, kind: type[Kind]) -> Kind:
        """Return the part of a kind, which there is."""
        found = self.get(kind)
        assert found is not None, f"no {kind.what}"
        return found

    def having(self, *parts: Part) -> QuantizedLinear:
        """Return the layer with some parts, in the place of those of their kinds."""
        kinds = {type(part) for part in parts}
        kept = [part for part in self.parts if type(part) not in kinds]
        return QuantizedLinear(*kept, *parts, input_scale=self.input_scale)

    def times(self, factors: Tensor) -> QuantizedLinear:
        """Return the layer with its output channels multiplied by factors, float32 [out]; its codes stay."""
        return QuantizedLinear(*(part.times(factors) for part in self.parts), input_scale=self.input_scale)

    def apart(self) -> Tensor | None:
        """Return the input channels for which the bulk counts as zero, int64 [k]; None if there are none."""
        channels = [own for part in self.additions if (own := part.apart()) is not None]
        return torch.cat(channels) if channels else None

    def read_bulk(self) -> Tensor:
        """Return the float32 weight [out, in] of the bulk alone, zero in the channels that other parts have."""
        weight = self.bulk.read()
        if (channels := self.apart()) is not None:
            weight[:, channels] = 0
        return weight

    def read(self) -> Tensor:
        """Return the float32 weight [out, in] that serving means."""
        weight = self.read_bulk()
        for part in self.additions:
            part.add(weight)
        return weight

    def cpu(self) -> QuantizedLinear:
        """Return a copy on the CPU."""
        return self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> QuantizedLinear:
        """Return a copy on a device."""
        scale = None if self.input_scale is None else self.input_scale.to(device)
        return QuantizedLinear(*(part.to(device) for part in self.parts), input_scale=scale)
