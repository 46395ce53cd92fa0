"""WKVQuant (Yue et al. 2024, "WKVQuant: quantizing weight and key/value cache"), the half that concerns the cache.

Past-only quantization: a token attends to its own key and value in full precision and to those before it from codes.
Two-dimensional quantization: static shifts and scales make channels even, then a token's group of channels is coded
between its ends. The authors learn shifts and scales by gradients of a loss across several blocks. Here the shift is
the middle of a channel's range and the scale its half range to the power a, a being that of five which makes the
layer's own error least: logits' for keys, the output projection's for values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.simulate.coder import Coder, Decoded, Run, Sample, Shape, all_but_newest, with_exact
from kv_cache.simulate.uniform import HALF_PAIR_BITS, between_ends

GROUP = 128
"""Channels that share a step; a head's where it has fewer."""
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
JUDGED = 4096
"""Tokens on which a power is chosen."""


class WKVQuant(Coder):
    """Static shift and scale by channel, dynamic step by token."""

    def __init__(self, bits: int) -> None:
        self.code_bits = bits
        self.channels: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def fit(self, layer: int, sample: Sample) -> None:
        """Choose shifts and scales."""
        metric = sample.value_metric
        self._choose(layer, "key", sample.key, sample.moments.metric.float())
        self._choose(layer, "value", sample.value, None if metric is None else metric.float())

    def _choose(self, layer: int, kind: str, x: Tensor, metric: Tensor | None) -> None:
        x = x.flatten(0, 1)
        low, high = x.amin(0), x.amax(0)
        shift, reach = (high + low) / 2, ((high - low) / 2).clamp_min(1e-6)
        seen = x[:: max(1, len(x) // JUDGED)]
        if metric is None:
            metric = torch.eye(x.shape[-1], device=x.device).expand(x.shape[1], -1, -1)
        costs = {}
        for power in POWERS:
            scale = reach**power
            error = self._rounded(seen, shift, scale) - seen
            costs[power] = torch.einsum("thc,hcd,thd->", error, metric, error).item()
        self.channels[layer, kind] = shift, reach ** min(costs, key=costs.__getitem__)

    def _rounded(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        groups = ((x - shift) / scale).unflatten(-1, (-1, min(GROUP, x.shape[-1])))
        return between_ends(groups, self.code_bits).flatten(-2) * scale + shift

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Code all but the newest token."""
        past = all_but_newest(key, 1)
        read_key = self._rounded(key, *self.channels[layer, "key"])
        return Decoded(read_key, self._rounded(value, *self.channels[layer, "value"]), past, past)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return codes, steps and the one exact token."""
        return with_exact(self.code_bits + HALF_PAIR_BITS / min(GROUP, shape.head_dim), 1, tokens)
