"""vLLM's dtypes of 4-bit floating-point numbers: nvfp4, nvfp4_4over6, ultraquant_4bit (vLLM 0.32).

A code is a number of ``LEVELS`` (E2M1). nvfp4: 16 channels share an e4m3 scale, their largest number over 6; the scale
of the whole layer is 1 where the checkpoint has none. nvfp4_4over6 (Cook et al. 2025, "Four over six") takes the
largest over 6 or over 4 for each block, whichever errs less. ultraquant_4bit: 32 channels share a power of two, keys
are mixed by a Hadamard matrix, and the two layers at either end stay as they are (v1/attention/ops/ultraquant/).

None is served on an H100: nvfp4 needs Blackwell's kernels, ultraquant AMD's. Here they show what the formats cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kv_cache.simulate.coder import FULL, Coder, Decoded, Run, Sample, Shape
from kv_cache.simulate.lloyd_max import nearest
from kv_cache.simulate.plain import saturated
from kv_cache.simulate.turboquant import BOUNDARY
from kv_cache.transforms import hadamard_sums

LEVELS = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ULTRA_SHARE = 0.156
"""A group's largest number times this, rounded to a power of two, is ultraquant's scale."""


def to_fp4(x: Tensor) -> Tensor:
    """Return the nearest of ``LEVELS``."""
    return nearest(torch.tensor(LEVELS, device=x.device), x)


class NvFp4(Coder):
    """Blocks of 16 channels with an e4m3 scale."""

    block = 16

    def __init__(self, four_over_six: bool = False) -> None:
        self.largest = (6.0, 4.0) if four_over_six else (6.0,)

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Round blocks."""
        return Decoded(self._rounded(key), self._rounded(value))

    def _rounded(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, self.block))
        best = best_error = None
        for largest in self.largest:
            scale = saturated(blocks.abs().amax(-1, keepdim=True) / largest, torch.float8_e4m3fn)
            read = to_fp4(blocks / scale.clamp_min(1e-9)) * scale
            error = (read - blocks).square().sum(-1, keepdim=True)
            if best is None or best_error is None:
                best, best_error = read, error
            else:
                best, best_error = torch.where(error < best_error, read, best), torch.minimum(error, best_error)
        assert best is not None
        return best.flatten(-2)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return 4 and their part of a scale's byte."""
        return 4 + 8 / self.block


class UltraQuant(Coder):
    """Groups of 32 channels with a power of two."""

    group = 32

    def __init__(self) -> None:
        self.layers = 0

    def fit(self, layer: int, sample: Sample) -> None:
        """Count the layers."""
        self.layers = layer + 1

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Round groups, but in the layers at either end."""
        kept = min(BOUNDARY, self.layers // 2)
        if layer < kept or layer >= self.layers - kept:
            return Decoded(key, value)
        dim = key.shape[-1]
        size = math.sqrt(dim & -dim)
        return Decoded(hadamard_sums(self._rounded(hadamard_sums(key) / size)) / size, self._rounded(value))

    def _rounded(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group))
        scale = torch.exp2((groups.abs().amax(-1, keepdim=True) * ULTRA_SHARE).clamp_min(2.0**-127).log2().round())
        return (to_fp4(groups / scale) * scale).flatten(-2)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return 4 and a group's byte in coded layers, averaged with the full ones."""
        kept = 2 * min(BOUNDARY, shape.layers // 2)
        return ((4 + 8 / self.group) * (shape.layers - kept) + FULL * kept) / shape.layers
