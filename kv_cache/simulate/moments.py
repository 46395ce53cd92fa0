"""The calibration of this project's scales from a layer's sample, by the formulas of kv_cache/calibration.py.

A sample holds all its tokens, so that nothing needs to be summed up on the way, and the moments themselves are kept,
since coders weigh errors by them. Queries are not turned back to position 0, unlike there: the metric is averaged over
the positions that the sample leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kv_cache.moments import average_over_positions, directions, grouped, query_weights, scales_of_moments
from kv_cache.scales import LayerScales

if TYPE_CHECKING:
    from kv_cache.simulate.coder import Sample


@dataclass(frozen=True, eq=False)
class KeyMoments:
    """Moments of one layer's keys, without those of position 0, which are of another kind.

    Attributes:
        mean: float64 [KV heads, head_dim], before rotary embedding.
        covariance: float64 [KV heads, head_dim, head_dim], of centred keys, averaged over positions.
        metric: float64 of the same shape, what a key's error costs, averaged over positions.

    """

    mean: Tensor
    covariance: Tensor
    metric: Tensor


def key_moments(sample: Sample) -> KeyMoments:
    """Return the moments of a sample's keys."""
    windows, tokens, kv_heads, dim = sample.key.shape
    device = sample.key.device
    total = torch.zeros(kv_heads, dim, dtype=torch.float64, device=device)
    square, metric = (torch.zeros(kv_heads, dim, dim, dtype=torch.float64, device=device) for _ in range(2))
    positions = torch.arange(tokens, device=device)
    for query, key, value in zip(sample.query, sample.key, sample.value, strict=True):
        base = sample.rotary.turn(key, -positions)[1:].double()
        total += base.sum(0)
        square += torch.einsum("thc,thd->hcd", base, base)
        weight = query_weights(sample.query_positions, query, key, value, sample.scaling).double()
        rows = grouped(query, kv_heads).double()
        metric += torch.bmm((rows * weight[..., None]).mT, rows)
    mean = total / (windows * (tokens - 1))
    covariance = square / (windows * (tokens - 1)) - torch.einsum("hc,hd->hcd", mean, mean)
    return KeyMoments(
        mean,
        average_over_positions(covariance, sample.rotary),
        average_over_positions(metric, sample.rotary, max(sample.rotary.max_position - tokens, 1)),
    )


def layer_scales(sample: Sample) -> LayerScales:
    """Return the scales of this project's formats, on the sample's device."""
    moments = sample.moments
    rows = directions(sample.value[:, 1:].flatten(0, 1).double()).transpose(0, 1)
    return scales_of_moments(
        key_mean=moments.mean,
        key_first=sample.first_key.double().mean(0),
        covariance=moments.covariance,
        metric=moments.metric,
        value_size=sample.value.double().square().mean((0, 1, 3)).sqrt(),
        value_direction=torch.bmm(rows.mT, rows) / rows.shape[1],
        rotary=sample.rotary,
    )
