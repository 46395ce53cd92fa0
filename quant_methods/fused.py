"""Layers that vLLM joins when it loads a model. All of them must be stored alike, or none of them is quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""The last parts of the names of layers that become one matrix."""
EXPERT = re.compile(r"(?:.*\.)?experts\.(?=\d+\.)")
"""What the name of an expert's layer begins with; all experts of a block become one layer."""


def families(names: Iterable[str]) -> list[list[str]]:
    """Group layers: those that vLLM joins are together, any other is alone.

    Args:
        names: of layers, full or within a block.

    Returns:
        The groups, in the order in which the first of each comes.

    """
    found: dict[str, list[str]] = {}
    for name in names:
        parent, _, local = name.rpartition(".")
        family = next((family for family in FUSED if local in family), (local,))
        expert = EXPERT.match(name)
        found.setdefault(expert.group() if expert else f"{parent}.{family[0]}", []).append(name)
    return list(found.values())


def is_expert(name: str) -> bool:
    """Return whether a layer belongs to an expert of a mixture, by its name."""
    return EXPERT.match(name) is not None


def experts_of(names: Sequence[str]) -> str | None:
    """Return the glob that matches all experts of the block that some layers belong to; None if they are no experts'.

    Layers of one expert alone are named one by one, so they have none either.
    """
    found = {match.group() if (match := EXPERT.match(name)) else None for name in names}
    (prefix, *others) = found
    one = len({name.rpartition(".")[0] for name in names}) == 1
    return None if prefix is None or others or one else f"{prefix}*"
