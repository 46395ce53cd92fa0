"""The arithmetic of kv_cache/codec.py on many sequences at once and on any device, for simulations.

Only the transform's sums are taken in another order than the specification takes them, which moves a code by one where
a number lies within rounding of the middle between two codes. Values need no other functions than the specification's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache import codec
from kv_cache.scales import LayerScales


def centres(scales: LayerScales, tokens: int) -> Tensor:
    """Return the centres of keys at positions 0 .. tokens - 1, float32 [tokens, heads, head_dim]."""
    return codec.centres(scales, torch.arange(tokens, device=scales.key_mean.device))


def even_keys(key: Tensor, scales: LayerScales, centre: Tensor) -> Tensor:
    """Return keys less their centre, transformed.

    Args:
        key: [sequences, tokens, heads, head_dim], any float dtype, after rotary embedding.
        scales: the layer's, on the keys' device.
        centre: [tokens, heads, head_dim], what `centres` returns or takes its place.

    Returns:
        float32 of the keys' shape.

    """
    return torch.einsum("hcd,sthd->sthc", scales.key_transform, key.float() - centre)


def uneven_keys(even: Tensor, scales: LayerScales, centre: Tensor | None) -> Tensor:
    """Undo `even_keys`; without a centre, of differences of keys."""
    key = torch.einsum("hcd,sthd->sthc", scales.key_inverse, even)
    return key if centre is None else key + centre


def read_back(even: Tensor, bits: int) -> Tensor:
    """Return what is read of even keys or values [..., heads, channels] from codes of so many bits, float32."""
    return codec.dequantize(*codec.quantize(even, bits), bits)
