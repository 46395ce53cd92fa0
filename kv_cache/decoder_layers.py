"""What a configuration of transformers says of a decoder's single layers."""

from __future__ import annotations

from typing import Any


def layer_type(config: Any, index: int) -> str | None:
    """Return what transformers calls a layer's attention ("sliding_attention"); None where all layers are alike."""
    types = getattr(config, "layer_types", None)
    return types[index] if types else None


def keeps_keys(config: Any, index: int) -> bool:
    """Return whether a layer keeps keys and values of its own: it has attention, and reads no other layer's cache."""
    kind = layer_type(config, index) or "full_attention"
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return (
        ("attention" in kind or "hybrid" in kind)
        and kind != "linear_attention"
        and (index < config.num_hidden_layers - shared)
    )
