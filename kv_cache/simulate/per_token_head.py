"""vLLM's dtypes with a scale for each token and head: int8, fp8 and int4 (vLLM 0.32).

Sources: v1/attention/ops/triton_reshape_and_cache_flash.py (``_reshape_cache_per_token_head``) and
v1/attention/ops/int4_per_token_head.py. Keys and values are coded alike. A scale takes 4 bytes; that of int4 keeps its
zero point in the lowest 4 bits of its mantissa.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.simulate.coder import Coder, Decoded, Run, Shape
from kv_cache.simulate.plain import saturated
from kv_cache.transforms import hadamard_sums

SMALLEST_SCALE = 1e-6
SCALE_BITS = 32
SIGN_SEED = 0x9E3779B9
"""Of vLLM's random signs; the generator is PyTorch's on the CPU, so these are the very signs that it serves with."""


class PerTokenHead(Coder):
    """``int8_per_token_head`` and ``fp8_per_token_head``: the largest number of a token's head gives the scale."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Choose ``torch.int8`` or ``torch.float8_e4m3fn``."""
        self.dtype = dtype

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Scale and round."""
        return Decoded(self._rounded(key), self._rounded(value))

    def _rounded(self, x: Tensor) -> Tensor:
        whole = self.dtype == torch.int8
        largest = 127.0 if whole else torch.finfo(self.dtype).max
        scale = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(SMALLEST_SCALE)
        y = x * (1.0 / scale)
        return (away_from_zero(y).clamp(-128.0, 127.0) if whole else saturated(y, self.dtype)) * scale

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return a byte and its part of the scale."""
        return 8 + SCALE_BITS / shape.head_dim


class Int4PerTokenHead(Coder):
    """``int4_per_token_head``: random signs, Hadamard, then 16 levels from the smallest to the largest channel."""

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Mix, round, and mix back."""
        return Decoded(self._rounded(key), self._rounded(value))

    @staticmethod
    def _rounded(x: Tensor) -> Tensor:
        dim = x.shape[-1]
        run = dim & -dim
        generator = torch.Generator().manual_seed(SIGN_SEED)
        signs = 2.0 * torch.bernoulli(torch.full((run,), 0.5), generator=generator) - 1.0
        signs = signs.repeat(dim // run).to(x.device)
        mixed = hadamard_sums(x * signs)
        low, high = mixed.amin(-1, keepdim=True), mixed.amax(-1, keepdim=True)
        scale = ((high - low) / 15.0).clamp_min(SMALLEST_SCALE)
        zero = away_from_zero(-low / scale).clamp(0.0, 15.0)
        codes = away_from_zero(mixed * (1.0 / scale) + zero).clamp(0.0, 15.0)
        read_scale = (scale.contiguous().view(torch.int32) & -16).view(torch.float32)
        return hadamard_sums((codes - zero) * read_scale) * signs / run

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return 4 and their part of the scale."""
        return 4 + SCALE_BITS / shape.head_dim


def away_from_zero(x: Tensor) -> Tensor:
    """Return the nearest whole number, of two equally near ones that which is farther from zero."""
    return (x.abs() + 0.5).floor() * x.sign()
