"""vLLM's TurboQuant dtypes (vLLM 0.32), after Zandieh et al. 2025, "TurboQuant", without its QJL half.

Sources: model_executor/layers/quantization/turboquant/, v1/attention/ops/triton_turboquant_store.py and
triton_turboquant_decode.py. Keys of 3 and 4 bits: normalized to length 1, multiplied by a Hadamard matrix, each channel
rounded to the Lloyd-Max levels of a Gaussian of variance 1 / head_dim; read back with the levels' vector normalized
again ("norm correction") and the length in float16. Keys of 8 bits: e4m3 without scale. Values: uniform levels from a
token's smallest to its largest channel, the first and the step in float16.

vLLM keeps the first two and the last two layers of a model in its own dtype (``get_boundary_skip_layers``); that is
part of what it serves, and these layers' bits are counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from kv_cache.simulate.coder import FULL, Coder, Decoded, Run, Sample, Shape
from kv_cache.simulate.lloyd_max import nearest, normal_levels
from kv_cache.simulate.plain import saturated
from kv_cache.transforms import hadamard_sums

BOUNDARY = 2
"""Layers at either end that vLLM does not code."""


class TurboQuant(Coder):
    """One of ``turboquant_k8v4``, ``turboquant_4bit_nc``, ``turboquant_k3v4_nc``, ``turboquant_3bit_nc``."""

    def __init__(self, key_bits: int, value_bits: int, boundary: int = BOUNDARY) -> None:
        """Choose the bits.

        Args:
            key_bits: 3, 4, or 8 for fp8.
            value_bits: 3 or 4.
            boundary: layers at either end that stay as they are.

        """
        self.key_bits, self.value_bits, self.boundary = key_bits, value_bits, boundary
        self.layers = 0

    def fit(self, layer: int, sample: Sample) -> None:
        """Count the layers."""
        self.layers = layer + 1

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Round, but in the layers at either end."""
        kept = min(self.boundary, self.layers // 2)
        if layer < kept or layer >= self.layers - kept:
            return Decoded(key, value)
        read_key = saturated(key, torch.float8_e4m3fn) if self.key_bits == 8 else self._keys(key)
        return Decoded(read_key, self._values(value))

    def _keys(self, key: Tensor) -> Tensor:
        dim = key.shape[-1]
        if dim & (dim - 1):
            raise ParetoError(f"TurboQuant's Hadamard matrix needs a power of two of channels, not {dim}")
        norm = key.norm(dim=-1, keepdim=True)
        mixed = hadamard_sums(key / (norm + 1e-8)) / math.sqrt(dim)
        levels = (normal_levels(self.key_bits) / math.sqrt(dim)).float().to(key.device)
        read = nearest(levels, mixed)
        read = read / (read.square().sum(-1, keepdim=True) + 1e-16).sqrt()
        return hadamard_sums(read) / math.sqrt(dim) * norm.half().float()

    def _values(self, value: Tensor) -> Tensor:
        low, high = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
        top = 2**self.value_bits - 1
        scale = ((high - low) / top).clamp_min(1e-8)
        codes = ((value - low) / scale + 0.5).floor().clamp(0, top)
        return codes * scale.half().float() + low.half().float()

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the slot's bits in coded layers, averaged with the full ones."""
        key = math.ceil(shape.head_dim * self.key_bits / 8) + (0 if self.key_bits == 8 else 2)
        slot = key + math.ceil(shape.head_dim * self.value_bits / 8) + 4
        coded = 8 * (slot + slot % 2) / (2 * shape.head_dim)
        kept = 2 * min(self.boundary, shape.layers // 2)
        return (coded * (shape.layers - kept) + FULL * kept) / shape.layers
