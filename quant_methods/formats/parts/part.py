"""What all parts of a layer's weight have in common.

A layer's weight is the sum of its parts: one :class:`Bulk`, which covers the whole matrix, and what is added to it,
each an :class:`Addition`. The file of a part has two classes: its tensors (a :class:`Part`), and how these are stored
(a :class:`PartForm`), which is what a checkpoint's metadata says of it. ``registry.py`` lists the parts.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from kv_cache.errors import ParetoError

if TYPE_CHECKING:
    from quant_methods.formats.quantized import QuantizedLinear

Range = tuple[int, int]
"""Channels: the first one, and the one after the last."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a module's tensors by local name."""


@dataclass
class Part(ABC):
    """The tensors of one part of a weight [out, in]; the subclass names them."""

    kind: ClassVar[str]
    """Its name in a checkpoint's metadata."""
    what: ClassVar[str]
    """What messages call it."""
    learns: ClassVar[tuple[str, ...]] = ()
    """The floating-point tensors that training may move."""
    of_rows: ClassVar[str] = "scale"
    """The tensor [out, ...] that all of an output channel's weights are proportional to."""

    @abstractmethod
    def pack(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores, by local name; nothing if the part is empty."""

    @abstractmethod
    def cut(self, rows: Range, inputs: Range) -> Self:
        """Return the part of some output and input channels of the weight.

        Raises:
            ParetoError: it cannot be cut there.

        """

    @classmethod
    @abstractmethod
    def stack(cls, layers: Sequence[QuantizedLinear]) -> Self:
        """Return the part of a layer with the output channels of several, of which at least one has it."""

    def times(self, factors: Tensor) -> Self:
        """Return the part of a weight whose output channels are multiplied by factors, float32 [out].

        Codes stay; what they are multiplied by is rounded to the dtype that it is stored in.
        """
        value: Tensor = getattr(self, self.of_rows)
        each = factors.to(value.device).view(-1, *[1] * (value.dim() - 1))
        changed: Any = {self.of_rows: (value.float() * each).to(value.dtype)}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


class Bulk(Part):
    """The part that covers the whole weight: codes for all of it."""

    bits: int
    """Of a code."""

    @classmethod
    def stack(cls, layers: Sequence[QuantizedLinear]) -> Self:
        """Return the codes of layers on top of each other, of which each stacks with the others.

        What a subclass does not say otherwise: its tensors begin with output channels, or with tiles of them; and it is
        symmetric where all are.
        """
        parts = [layer.part(cls) for layer in layers]
        of_each = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls)}
        joined: dict[str, Any] = {
            name: torch.cat(values) if isinstance(values[0], Tensor) else all(values)
            for name, values in of_each.items()
            if isinstance(values[0], Tensor | bool)
        }
        return dataclasses.replace(parts[0], **joined)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Output and input channels."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it lies."""

    @abstractmethod
    def read(self) -> Tensor:
        """Return the float32 weight [out, in]."""

    @abstractmethod
    def without(self, channels: Tensor) -> tuple[Self, Tensor | None]:
        """Leave input channels out, as far as codes can say so.

        Args:
            channels: int64 [k].

        Returns:
            A bulk that reads as zero there; or one that cannot, and the float32 [out, k] that it still reads as.

        """

    @abstractmethod
    def stacks_with(self, other: Bulk) -> bool:
        """Return whether two layers of these bulks can be one."""


class Addition(Part):
    """A part that is added to the bulk."""

    @abstractmethod
    def add(self, weight: Tensor) -> None:
        """Add the part to a float32 weight [out, in], in place."""

    def apart(self) -> Tensor | None:
        """Return the input channels that are this part's alone, int64 [k]: the bulk counts as zero there.

        Where serving rounds inputs for the bulk, these channels are left out of the rounding. None: there are none.
        """
        return None

    def take_over(self, bulk: Bulk) -> tuple[Bulk, Addition]:
        """Return both such that they add up to the layer if the whole bulk is multiplied by and nothing left out.

        That is how layers are served whose inputs are not rounded: only :meth:`apart` needs it.
        """
        return bulk, self


class Stored(NamedTuple):
    """A tensor in a checkpoint.

    Attributes:
        shape: its shape; -1 for an extent that only the tensor knows.
        dtype: its dtype; None for the 16-bit one that the model is served in.

    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Draw:
    """Draws random parts, as ``--load-format dummy`` wants them.

    Attributes:
        size: of weights, which are drawn evenly from -size to size.
        dtype: of what is stored in 16 bits.
        device: where.

    """

    size: float
    dtype: torch.dtype
    device: torch.device

    def uniform(self, *shape: int) -> Tensor:
        """Return weights."""
        return ((torch.rand(shape, device=self.device) * 2 - 1) * self.size).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return int8 numbers from ``low`` to before ``high``."""
        return torch.randint(low, high, shape, device=self.device, dtype=torch.int8)

    def channels(self, count: int, inputs: int) -> Tensor:
        """Return int32 [count], input channels evenly spread."""
        # In integers: PyTorch's default dtype is the model's while an engine loads, which does not have all of them.
        return (torch.arange(count, device=self.device) * inputs // count).int()


@dataclass(frozen=True)
class PartForm(ABC):
    """How a part is stored: the settings that a checkpoint's metadata holds. The subclass names them."""

    part: ClassVar[type[Part]]

    @abstractmethod
    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors of a part of a weight [rows, inputs], by local name."""

    @classmethod
    @abstractmethod
    def found(cls, shapes: Shapes) -> Self | None:
        """Return the form of the part that lies in a module's tensors, None if they have none of this kind."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> Part:
        """Return the part that a module's tensors hold; they are those of :meth:`tensors`, or more."""

    @abstractmethod
    def random(self, rows: int, inputs: int, draw: Draw) -> Part:
        """Return a random part of a weight [rows, inputs]."""

    def check(self, where: str) -> None:
        """Refuse settings that mean nothing; the subclass adds to it.

        Raises:
            ParetoError: ``where``, and what is wrong.

        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # A bool is an int to Python, and a count of `true` is a mistake.
            if type(value).__name__ != field.type:
                raise ParetoError(f"{where}: {field.name} is {value!r}, expected {field.type}")

    def stored_bits(self, rows: int, inputs: int, found: Shapes | None = None) -> int:
        """Return the storage of a part of a weight [rows, inputs], in bits.

        Args:
            rows: output channels.
            inputs: input channels.
            found: shapes of its tensors, where the form does not say all of them.

        """
        total = 0
        for name, stored in self.tensors(rows, inputs).items():
            shape = stored.shape if found is None else found[name]
            assert min(shape) >= 0, f"only the tensors say how much {self.part.what} they hold"
            total += math.prod(shape) * 8 * (2 if stored.dtype is None else stored.dtype.itemsize)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return what the metadata holds."""
        return {"part": self.part.kind, **dataclasses.asdict(self)}

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read what the metadata holds, without the part's name.

        Raises:
            ParetoError: ``where``, and an unknown key, a missing one, or a bad value.

        """
        fields = dataclasses.fields(cls)
        known = [field.name for field in fields]
        if unknown := sorted(set(values) - set(known)):
            raise ParetoError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known) or 'none'}")
        needed = [field.name for field in fields if field.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in values]:
            raise ParetoError(f"{where}: {missing[0]} is missing")
        form = cls(**values)
        form.check(where)
        return form


def expect_one_of(where: str, name: str, value: int, known: Sequence[int] | range) -> None:
    """Refuse a setting that is none of those that there are.

    Raises:
        ParetoError: ``where``, the setting's ``name``, and those known.

    """
    if value not in known:
        raise ParetoError(f"{where}: {name} is {value!r}, expected one of {', '.join(map(str, known))}")


class BulkForm(PartForm):
    """How a bulk is stored."""

    bits: int
    """Of a code."""

    @classmethod
    @abstractmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        """Return the output and input channels of the weight whose bulk lies in tensors of these shapes."""

    @abstractmethod
    def slow_on_cuda(self) -> str | None:
        """Return a line about a bulk that no CUDA kernel multiplies by, with what to choose instead; else None.

        It is said before a model is compressed so, and when it is served.
        """


def slow_on_cuda(what: str, bits: int, instead: str) -> str:
    """Return what is said of weights without a CUDA kernel: what serving costs, and what to choose instead."""
    return (
        f"{bits}-bit {what} have no CUDA kernel: PyTorch expands them to 16 bits at every step, which takes longer "
        f"than 16-bit weights do; {instead}"
    )
