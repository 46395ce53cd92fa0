"""Keys and values in a floating-point dtype: the uncompressed cache, and vLLM's fp8.

vLLM's ``fp8`` is e4m3 with one scale for each layer's keys and one for its values, which are 1 where the checkpoint has
none: the kernels saturate what is beyond 448 (vLLM 0.32, csrc/quantization/w8a8/fp8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.simulate.coder import Coder, Decoded, Run, Shape


class Plain(Coder):
    """Rounds to a dtype.

    ``bfloat16`` shows the noise floor: what the uncompressed cache itself loses against full precision.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Saturate and round."""
        return Decoded(self._rounded(key), self._rounded(value))

    def _rounded(self, x: Tensor) -> Tensor:
        return saturated(x, self.dtype)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the dtype's bits; the scales of a layer are nothing."""
        return float(torch.finfo(self.dtype).bits)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x rounded to a floating-point dtype, in x's own; what is beyond its largest number becomes that."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).to(x.dtype)
