"""How a layer is stored in the format of ours: the forms of its parts, and what serving does to its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.part import BulkForm, Draw, PartForm, Shapes, Stored
from quant_methods.formats.parts.registry import FORMS, form_named
from quant_methods.formats.quantized import QuantizedLinear

ACTIVATION_BITS = {"none": None, "int8": 8, "int6": 6}
"""What serving rounds activations to."""

Kind = TypeVar("Kind", bound=PartForm)


@dataclass(frozen=True)
class Form:
    """How a layer is stored.

    Attributes:
        parts: how each of its parts is, the bulk first, then in the order of ``parts/registry.py``.
        activations: ``none``, ``int8`` or ``int6``: what serving rounds each token's inputs to.

    """

    parts: tuple[PartForm, ...]
    activations: str = "none"

    @property
    def bulk(self) -> BulkForm:
        """How the part is stored that covers the whole weight."""
        return next(part for part in self.parts if isinstance(part, BulkForm))

    def get(self, kind: type[Kind]) -> Kind | None:
        """Return how the part of a kind is stored, None if there is none."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    def check(self, where: str) -> None:
        """Refuse what is no form.

        Raises:
            ParetoError: ``where``, and what is wrong.

        """
        kinds = [part.part.kind for part in self.parts]
        if sum(isinstance(part, BulkForm) for part in self.parts) != 1:
            bulks = ", ".join(kind for kind, form in FORMS.items() if issubclass(form, BulkForm))
            raise ParetoError(
                f"{where}: parts are {', '.join(kinds) or 'none'}; expected exactly one that covers the whole weight "
                f"({bulks})"
            )
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise ParetoError(f"{where}: part {twice!r} is there twice")
        for part in self.parts:
            part.check(f"{where}: {part.part.kind}")
        if not isinstance(self.activations, str) or self.activations not in ACTIVATION_BITS:
            known = ", ".join(ACTIVATION_BITS)
            raise ParetoError(f"{where}: activations is {self.activations!r}, expected one of {known}")

    def tensors(self, rows: int, inputs: int) -> dict[str, Stored]:
        """Return the tensors of a layer [rows, inputs] by local name."""
        return {name: stored for part in self.parts for name, stored in part.tensors(rows, inputs).items()}

    def random(self, rows: int, inputs: int, draw: Draw) -> QuantizedLinear:
        """Return a random layer [rows, inputs]."""
        return QuantizedLinear(*(part.random(rows, inputs, draw) for part in self.parts))

    def stored_bits(self, shapes: Shapes) -> int:
        """Return the storage of a layer, in bits, from its tensors' shapes by local name."""
        rows, inputs = self.bulk.size(shapes)
        return sum(part.stored_bits(rows, inputs, shapes) for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return what a group of config.json says of it."""
        return {"parts": [part.to_dict() for part in self.parts], "activations": self.activations}

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Form:
        """Read what a group of config.json says.

        Raises:
            ParetoError: ``where``, and an unknown key or part, or a bad value.

        """
        if unknown := sorted(set(values) - {"parts", "activations"}):
            raise ParetoError(f"{where}: unknown key {unknown[0]!r}; known: activations, parts, targets")
        parts = values.get("parts")
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) and "part" in part for part in parts):
            raise ParetoError(f"{where}: parts: expected a list of mappings with the key 'part'")
        found = []
        for part in parts:
            kind = form_named(part["part"], where)
            found.append(kind.parse({k: v for k, v in part.items() if k != "part"}, f"{where}: {part['part']}"))
        form = cls(in_order(found), values.get("activations", "none"))
        form.check(where)
        return form


def in_order(parts: list[PartForm]) -> tuple[PartForm, ...]:
    """Return the forms of parts in the order of the registry, so that equal layers have equal forms."""
    order = list(FORMS.values())
    return tuple(sorted(parts, key=lambda part: order.index(type(part))))


def form_of(shapes: Shapes, activations: str) -> Form | None:
    """Return the form of a stored layer; None if no bulk lies in its tensors.

    Args:
        shapes: its tensors' shapes by local name.
        activations: what serving rounds its inputs to, which the tensors do not say.

    """
    found = [part for kind in FORMS.values() if (part := kind.found(shapes)) is not None]
    return Form(tuple(found), activations) if any(isinstance(part, BulkForm) for part in found) else None
