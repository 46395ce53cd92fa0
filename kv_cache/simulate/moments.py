"""The calibration of this project's scales from a layer's sample: centres, and a transform that balances two moments.

The transform is made from the covariance of centred keys and from the mean cost of a key's error. An error e of the
key at position s moves query t's logit by ``q . e``; to second order the attention output then moves by
``p_s (v_s - o) q . e``, p being attention's weight and o its output. So the metric is the sum over queries and tokens
of ``(p_s |v_s - o|)^2 q q^T``. Both moments are averaged over the positions that the model serves, since rotary
embedding turns keys, and queries with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kv_cache.rotary import Rotary
from kv_cache.scales import LayerScales
from kv_cache.transforms import balanced_transform

if TYPE_CHECKING:
    from kv_cache.simulate.coder import Sample

AT_ONCE = 4
"""Windows whose attention weights are in memory together."""


@dataclass(frozen=True, eq=False)
class KeyMoments:
    """Moments of one layer's keys, without those of position 0, which are of another kind.

    Attributes:
        mean: float64 [KV heads, head_dim], before rotary embedding.
        covariance: float64 [KV heads, head_dim, head_dim], of centred keys, averaged over positions.
        metric: float64 of the same shape, the cost above, averaged over positions.

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
    for start in range(0, windows, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        base = sample.rotary.turn(sample.key[part], -positions)[:, 1:].flatten(0, 1).double()
        total += base.sum(0)
        square += torch.einsum("thc,thd->hcd", base, base)
        weight = query_weights(sample, part)
        query = sample.query[part].unflatten(2, (kv_heads, -1)).double()
        metric += torch.einsum("wtgr,wtgrc,wtgrd->gcd", weight.double(), query, query)
    mean = total / (windows * (tokens - 1))
    covariance = square / (windows * (tokens - 1)) - torch.einsum("hc,hd->hcd", mean, mean)
    longest = sample.rotary.max_position
    return KeyMoments(
        mean,
        mean_over_positions(covariance, sample.rotary, longest),
        mean_over_positions(metric, sample.rotary, max(longest - tokens, 1)),
    )


def query_weights(sample: Sample, part: slice) -> Tensor:
    """Return the sum over a query's tokens, but the first, of ``(p_s |v_s - o|)^2``.

    Args:
        sample: of a layer.
        part: which windows.

    Returns:
        float32 [windows, queries, KV heads, heads of each].

    """
    weights, distances = attention_of(sample, part)
    return torch.einsum("wgrts,wgrts->wtgr", weights[..., 1:].square(), distances[..., 1:])


def attention_of(sample: Sample, part: slice) -> tuple[Tensor, Tensor]:
    """Return attention's weights p_s and the squared distances ``|v_s - o|^2`` of each query of some windows.

    Returns:
        float32 [windows, KV heads, heads of each, queries, tokens], twice.

    """
    key, value = sample.key[part], sample.value[part]
    query = sample.query[part].unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("wtgrd,wsgd->wgrts", query, key) * sample.scaling
    later = torch.arange(key.shape[1], device=key.device) > sample.query_positions[:, None]
    weights = scores.masked_fill_(later, float("-inf")).softmax(-1)
    output = torch.einsum("wgrts,wsgd->wgrtd", weights, value)
    distance = value.square().sum(-1).transpose(1, 2)[:, :, None, None] + output.square().sum(-1)[..., None]
    distance = distance - 2 * torch.einsum("wgrtd,wsgd->wgrts", output, value)
    return weights, distance.clamp_min_(0)


def mean_over_positions(matrix: Tensor, rotary: Rotary, positions: int) -> Tensor:
    """Return the mean of ``R M R^T`` over rotary embedding's turns R by 0, 1 .. positions - 1.

    A pair of channels is one complex number, which a turn multiplies by ``exp(i w p)``. The entry of two pairs so
    consists of a part that turns with the difference of their frequencies and one that turns with the sum, and the
    mean multiplies each by a geometric series.

    Args:
        matrix: float64 [heads, dim, dim], symmetric.
        rotary: the embedding.
        positions: how many.

    """
    device = matrix.device
    first, second = (channels.to(device) for channels in rotary.channels())
    ff, fs = matrix[:, first][:, :, first], matrix[:, first][:, :, second]
    sf, ss = matrix[:, second][:, :, first], matrix[:, second][:, :, second]
    # With z = x_first + i x_second: E[z conj(z')] and E[z z'].
    difference, total = torch.complex(ff + ss, sf - fs), torch.complex(ff - ss, sf + fs)
    frequency = rotary.inv_freq.double().to(device)
    difference = difference * _geometric_mean(frequency[:, None] - frequency[None], positions)
    total = total * _geometric_mean(frequency[:, None] + frequency[None], positions)
    result = torch.empty_like(matrix)
    for rows, columns, part in (
        (first, first, (difference + total).real),
        (first, second, (total - difference).imag),
        (second, first, (total + difference).imag),
        (second, second, (difference - total).real),
    ):
        result[:, rows[:, None], columns[None]] = part / 2
    return result


def _geometric_mean(angle: Tensor, count: int) -> Tensor:
    """Return the mean of ``exp(i angle p)`` over p = 0 .. count - 1."""
    half = angle / 2
    small = half.sin().abs() < 1e-12
    ratio = torch.where(small, float(count), (half * count).sin() / torch.where(small, 1.0, half.sin()))
    return torch.polar(torch.ones_like(half), half * (count - 1)) * (ratio / count)


def layer_scales(sample: Sample) -> LayerScales:
    """Return the scales of this project's formats, on the sample's device."""
    moments = sample.moments
    transform = balanced_transform(moments.covariance.cpu(), moments.metric.cpu()).bfloat16().double()
    device = sample.key.device
    return LayerScales(
        key_mean=moments.mean.float(),
        key_first=sample.first_key.double().mean(0).float(),
        key_transform=transform.float().contiguous().to(device),
        key_inverse=torch.linalg.inv(transform).float().contiguous().to(device),
        value_size=sample.value.double().square().mean((0, 1, 3)).sqrt().float(),
        rotary=sample.rotary,
    )
