"""KVQuant (Hooper et al. 2024, "KVQuant: towards 10 million context length LLM inference").

Keys before rotary embedding, with a static range for each channel; values with a range for each token over all heads.
Both are brought to [-1, 1] and rounded to levels that weighted k-means finds for each layer ("nuq"). What lies beyond a
channel's percentiles (keys), or is among a token's outermost numbers (values), about 1 percent, is kept in float16 with
its place ("dense and sparse"). The first token stays in full precision. At 2 bits the levels read are shifted and
scaled to the mean and deviation of what they stand for ("Q-Norm").

The authors weigh k-means by the loss' squared gradients, which takes a backward pass over the model; here a key counts
by what an error of it does to its layer's attention output, a value by the squares of its attention weights.

Why it cannot be paged: a token has as many outliers as it happens to have, in sparse rows and columns that grow; the
authors' kernels multiply these apart from the dense part. Keys must be turned to their positions whenever they are
read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.moments import attention_of, grouped
from kv_cache.rotary import Rotary
from kv_cache.simulate.coder import Coder, Decoded, Run, Sample, Shape, first_exact, rotated, unrotated, with_exact
from kv_cache.simulate.lloyd_max import fitted_levels, nearest
from kv_cache.simulate.uniform import HALF_PAIR_BITS, half

OUTLIERS = 0.01
FIRST = 1
PLACE_BITS, NUMBER_BITS, POINTER_BITS = 16, 16, 32
"""Of an outlier's place and number, and of a token's start in the sparse rows or columns."""
FITTED = 2**21
"""Numbers that k-means looks at."""


class _Levels:
    """Non-uniform levels of one layer's keys or values, in [-1, 1], with Q-Norm's correction."""

    def __init__(self, x: Tensor, weight: Tensor, bits: int) -> None:
        step = max(1, x.numel() // FITTED)
        x, weight = x.flatten()[::step], weight.flatten()[::step]
        self.levels = fitted_levels(x, weight, bits)
        self.factor, self.shift = x.new_ones(()), x.new_zeros(())
        if bits == 2:
            rounded = nearest(self.levels, x)
            self.factor = x.std() / rounded.std()
            self.shift = x.mean() - rounded.mean() * self.factor

    def __call__(self, x: Tensor) -> Tensor:
        return nearest(self.levels, x) * self.factor + self.shift


class KVQuant(Coder):
    """``nuqB`` or ``nuqB-1%``."""

    def __init__(self, bits: int, outliers: bool) -> None:
        self.code_bits, self.outliers = bits, outliers
        self.rotary: Rotary | None = None
        self.layers: dict[int, tuple[Tensor, Tensor, _Levels, _Levels]] = {}

    def fit(self, layer: int, sample: Sample) -> None:
        """Choose the keys' ranges and both levels."""
        self.rotary = sample.rotary
        base = unrotated(sample.key, sample.rotary)
        flat = base.flatten(0, 1)
        ordered = flat.sort(0).values
        cut = round(len(flat) * OUTLIERS / 2) if self.outliers else 0
        low, high = ordered[cut], ordered[-1 - cut]
        middle, reach = (high + low) / 2, ((high - low) / 2).clamp_min(1e-6)
        scaled = (base - middle) / reach
        key_weight, value_weight = _sensitivity(sample)
        inside = scaled.abs() <= 1
        key_levels = _Levels(scaled[inside], key_weight[..., None].expand_as(scaled)[inside], self.code_bits)
        value_scaled, _, _, kept = self._value_range(sample.value)
        inside = ~kept
        spread = value_weight[..., None].expand_as(sample.value).flatten(-2)
        self.layers[layer] = middle, reach, key_levels, _Levels(value_scaled[inside], spread[inside], self.code_bits)

    def _value_range(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return values in [-1, 1], the middle and half range of each token, and which are outliers.

        All are of [windows, tokens, KV heads * head_dim], the middle and the half range with one number in the end.
        """
        flat = value.flatten(-2)
        count = _outliers_at_an_end(flat.shape[-1]) if self.outliers else 0
        if count:
            top, bottom = flat.topk(count, -1).values[..., -1:], flat.topk(count, -1, largest=False).values[..., -1:]
            kept = (flat >= top) | (flat <= bottom)
        else:
            kept = torch.zeros_like(flat, dtype=torch.bool)
        low = flat.masked_fill(kept, float("inf")).amin(-1, keepdim=True)
        high = flat.masked_fill(kept, float("-inf")).amax(-1, keepdim=True)
        middle, reach = half((high + low) / 2), half((high - low) / 2).clamp_min(1e-6)
        return (flat - middle) / reach, middle, reach, kept

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Round to the levels, and put the outliers back."""
        assert self.rotary is not None
        middle, reach, key_levels, value_levels = self.layers[layer]
        base = unrotated(key, self.rotary)
        scaled = (base - middle) / reach
        read = key_levels(scaled) * reach + middle
        if self.outliers:
            read = torch.where(scaled.abs() > 1, half(base), read)
        value_scaled, value_middle, value_reach, kept = self._value_range(value)
        read_value = value_levels(value_scaled) * value_reach + value_middle
        read_value = torch.where(kept, half(value.flatten(-2)), read_value).view_as(value)
        return Decoded(first_exact(rotated(read, self.rotary), key, FIRST), first_exact(read_value, value, FIRST))

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return codes, the values' ranges and, with outliers, their numbers, places and pointers."""
        width = shape.kv_heads * shape.head_dim
        key, value = float(self.code_bits), self.code_bits + HALF_PAIR_BITS / width
        if self.outliers:
            key += OUTLIERS * (PLACE_BITS + NUMBER_BITS) + POINTER_BITS / width
            count = 2 * _outliers_at_an_end(width)
            value += (count * (PLACE_BITS + NUMBER_BITS) + POINTER_BITS) / width
        return with_exact((key + value) / 2, FIRST, tokens)


def _outliers_at_an_end(width: int) -> int:
    return max(1, round(width * OUTLIERS / 2))


def _sensitivity(sample: Sample) -> tuple[Tensor, Tensor]:
    """Return what a key and a value of each token count, [windows, tokens, KV heads]."""
    keys, values = [], []
    for query, key, value in zip(sample.query, sample.key, sample.value, strict=True):
        attention, distance = attention_of(sample.query_positions, query, key, value, sample.scaling)
        squares = attention.square_()
        size = grouped(query, key.shape[1]).square().sum(-1)
        values.append(squares.sum(1).T)
        keys.append(torch.einsum("gts,gts,gt->sg", squares, distance, size))
    return torch.stack(keys), torch.stack(values)
