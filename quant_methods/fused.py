"""Layers that vLLM merges into one matrix when it loads a model. Their parts must be stored alike, or none of them."""

from __future__ import annotations

from collections.abc import Iterable

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""The last parts of such layers' names, each group in vLLM's order."""


def merged_with(name: str, names: Iterable[str]) -> list[str]:
    """Return those of the names whose layers vLLM merges with a layer, that layer itself included.

    Args:
        name: the layer's.
        names: of layers, full or within a block, as ``name`` is.

    """
    parent, _, local = name.rpartition(".")
    family = next((family for family in FUSED if local in family), (local,))
    known = set(names)
    return [full for part in family if (full := f"{parent}.{part}" if parent else part) in known]
