"""Exempt lists: parts of a model that stay in 16 bits, by name instead of by glob.

==================  ==============================================================
``embeddings``      token embeddings and the output head (never quantized so far,
                    whatever ``ignore`` says)
``first``, ``last`` the first and the last decoder block
``attention``       the linear layers of every attention: only the rest is quantized
``mlp``             every other linear layer of the blocks (of experts too)
``attention-only``  everything but attention, so that attention only is quantized
``mlp-only``        everything but the MLPs
==================  ==============================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_cache.errors import ParetoError

if TYPE_CHECKING:
    from quant_methods.calibration.calibrator import Decoder

NAMES = ("embeddings", "first", "last", "attention", "mlp", "attention-only", "mlp-only")


def check(names: tuple[str, ...]) -> None:
    """Refuse names that mean nothing, and lists that leave nothing.

    Raises:
        ParetoError: with the valid names.

    """
    for name in names:
        if name not in NAMES:
            raise ParetoError(f"exempt: {name!r} is unknown; names: {', '.join(NAMES)}; for other layers use ignore")
    attention = {"attention", "mlp-only"}.intersection(names)
    rest = {"mlp", "attention-only"}.intersection(names)
    if attention and rest:
        raise ParetoError(f"exempt: {min(attention)} and {min(rest)} together leave nothing to compress")


def globs(names: tuple[str, ...], decoder: Decoder) -> tuple[str, ...]:
    """Return the globs over module names that the exempt lists mean for a model.

    Raises:
        ParetoError: an unknown name, or one that no layer of the model answers to.

    """
    check(names)
    found: list[str] = []
    for name in names:
        layers = _layers(name, decoder)
        if not layers:
            raise ParetoError(f"exempt: {name}: this model has no such layer")
        found += [layer for layer in layers if layer not in found]
    return tuple(found)


def _layers(name: str, decoder: Decoder) -> list[str]:
    blocks = len(decoder.blocks)
    if name == "embeddings":
        ends = (decoder.model.get_input_embeddings(), decoder.model.get_output_embeddings())
        return [full for full, module in decoder.model.named_modules() if any(module is end for end in ends)]
    if name in ("first", "last"):
        return [decoder.name(0 if name == "first" else blocks - 1, "*")]
    wanted = name in ("attention", "mlp-only")
    return [
        decoder.name(index, local)
        for index in range(blocks)
        for local in decoder.linears(index)
        if in_attention(local) == wanted
    ]


def in_attention(local: str) -> bool:
    """Return whether a linear layer, by its name within a block, belongs to attention (``self_attn.q_proj``)."""
    return any("attn" in part or "attention" in part for part in local.lower().split(".")[:-1])
