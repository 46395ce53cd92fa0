"""AQUA-KV (Shutova et al. 2025, "Cache me if you must: adaptive key-value quantization").

A layer's keys, before rotary embedding and over all heads, are predicted linearly from what is read back of the layer
before; its values from what is read back of its own keys and of the values of the layer before. The residuals are
coded. Predictors are fitted one layer after the other on what earlier layers read back (the authors'
train_predictors.py). The first layer has 4 bits. The first four tokens, and the newest until they are 128, stay in full
precision.

Residuals are coded as HIGGS (Malinovskii et al. 2025) codes them, with its scalar grid: a Hadamard matrix over all
heads' channels, one float16 size for each token, Lloyd-Max levels. The authors use grids of two dimensions, which gain
a little.

Why it is not served so: whoever reads a key must first compute the prediction, which takes the same of all layers
before. Per token and layer that is one product of width x width and one of 2 width x width; for Mistral-7B's shape
(width 1,024, 32 layers) 0.2 GFLOP a token, 53 TFLOP a decode step at 32 x 8,192 tokens: 53 ms at 989 TFLOP/s, all of an
H100's peak, where the whole step with an uncompressed cache takes 18 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kv_cache.rotary import Rotary
from kv_cache.simulate.coder import (
    Coder,
    Decoded,
    Run,
    Sample,
    Shape,
    first_exact,
    rotated,
    unrotated,
    whole_tiles,
    with_exact,
)
from kv_cache.simulate.lloyd_max import nearest, normal_levels
from kv_cache.simulate.uniform import half
from kv_cache.transforms import hadamard_sums

FIRST, NEWEST = 4, 128
FIRST_LAYER_BITS = 4
RIDGE = 1e-3
"""Share of the inputs' mean square that is added to it, as the authors have it."""
SIZE_BITS = 16

Predictor = Callable[[Tensor], Tensor]


class AquaKV(Coder):
    """Predicts from what was read back, and codes the residuals."""

    def __init__(self, bits: int) -> None:
        self.code_bits = bits
        self.rotary: Rotary | None = None
        self.predictors: dict[int, tuple[Predictor, Predictor]] = {}
        self._before: tuple[Tensor, Tensor] | None = None

    def fit(self, layer: int, sample: Sample) -> None:
        """Fit this layer's predictors on what the layer before reads back of the calibration text."""
        self.rotary = sample.rotary
        key, value = unrotated(sample.key, sample.rotary).flatten(-2), sample.value.flatten(-2)
        if self._before is not None:
            before_key, before_value = self._before
            key_predictor = linear(before_key, key)
            read_key = self._residual(key, key_predictor(before_key), layer)
            self.predictors[layer] = key_predictor, linear(torch.cat([read_key, before_value], -1), value)
        self._before = self._read(layer, key, value, self._before)

    def _read(
        self, layer: int, key: Tensor, value: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if layer not in self.predictors or before is None:
            return self._residual(key, torch.zeros_like(key), layer), self._residual(
                value, torch.zeros_like(value), layer
            )
        before_key, before_value = before
        key_predictor, value_predictor = self.predictors[layer]
        read_key = self._residual(key, key_predictor(before_key), layer)
        return read_key, self._residual(value, value_predictor(torch.cat([read_key, before_value], -1)), layer)

    def _residual(self, x: Tensor, predicted: Tensor, layer: int) -> Tensor:
        return predicted + higgs(x - predicted, self.code_bits if layer else FIRST_LAYER_BITS)

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Predict from the layer before, and add the residual read back."""
        assert self.rotary is not None
        before = None
        if run.before is not None:
            before = unrotated(run.before.key, self.rotary).flatten(-2), run.before.value.flatten(-2)
        read = self._read(layer, unrotated(key, self.rotary).flatten(-2), value.flatten(-2), before)
        read_key, read_value = rotated(read[0].view_as(key), self.rotary), read[1].view_as(value)
        coded = whole_tiles(key, NEWEST)
        return Decoded(first_exact(read_key, key, FIRST), first_exact(read_value, value, FIRST), coded, coded)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return codes, sizes and exact tokens; the predictors are weights of the model."""
        codes = (self.code_bits * (shape.layers - 1) + FIRST_LAYER_BITS) / shape.layers
        return with_exact(codes + SIZE_BITS / (shape.kv_heads * shape.head_dim), FIRST + NEWEST / 2, tokens)


def linear(x: Tensor, y: Tensor) -> Predictor:
    """Return the affine map from x [..., inputs] to y [..., outputs] of least squared error, with a ridge."""
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    x_mean, y_mean = x.mean(0), y.mean(0)
    square = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    product = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(8192), y.split(8192), strict=True):
        centred = (a - x_mean).double()
        square += centred.T @ centred
        product += centred.T @ (b - y_mean).double()
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64, device=x.device)
    weight = torch.linalg.solve(square, product).float()
    return lambda inputs: (inputs - x_mean) @ weight + y_mean


def higgs(x: Tensor, bits: int) -> Tensor:
    """Return x [..., channels] read back from Lloyd-Max levels of its mixed channels, with a size for each vector."""
    dim = x.shape[-1]
    run = math.sqrt(dim & -dim)
    mixed = hadamard_sums(x) / run
    size = half(mixed.square().mean(-1, keepdim=True).sqrt()).clamp_min(1e-7)
    levels = normal_levels(bits).float().to(x.device)
    return hadamard_sums(nearest(levels, mixed / size) * size) / run
