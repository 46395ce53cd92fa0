"""Uniform levels between the smallest and the largest of a group of numbers, as KIVI, WKVQuant and others have them."""

from __future__ import annotations

from torch import Tensor

HALF_PAIR_BITS = 32
"""Of a group's step and smallest number, in float16."""


def between_ends(x: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Return x rounded to ``2**bits`` levels from its smallest to its largest number along a dimension.

    The step and the smallest number are kept in float16, and codes are made with the exact ones, as most code does it.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    top = 2**bits - 1
    step = ((high - low) / top).clamp_min(1e-8)
    codes = ((x - low) / step).round().clamp(0, top)
    return codes * half(step) + half(low)


def half(x: Tensor) -> Tensor:
    """Return x rounded to float16, saturated, in its own dtype."""
    return x.clamp(-65504.0, 65504.0).half().to(x.dtype)
