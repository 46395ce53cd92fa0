"""What calibration sums up, and the scales that the sums make: weights of queries, averages over positions.

The sums are those of kv_cache/calibration.py, whose docstring has the formulas; the study of formats makes its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kv_cache.rotary import Rotary
from kv_cache.scales import MATRIX_DTYPE, LayerScales
from kv_cache.transforms import balanced_transform, mirror_to_constant


def scales_of_moments(
    *,
    key_mean: Tensor,
    key_first: Tensor,
    covariance: Tensor,
    metric: Tensor,
    value_size: Tensor,
    value_direction: Tensor,
    rotary: Rotary,
) -> LayerScales:
    """Return the scales of one layer, on the device of its moments.

    Args:
        key_mean: float64 [num_kv_heads, head_dim], of keys at position 0.
        key_first: float64 [num_kv_heads, head_dim], of first tokens' keys.
        covariance: float64 [num_kv_heads, head_dim, head_dim], of the other keys, averaged over positions.
        metric: H, averaged over positions, of the same shape and dtype.
        value_size: float64 [num_kv_heads], the values' root mean square.
        value_direction: float64 [num_kv_heads, head_dim, head_dim], the mean of ``v v^T / |v|^2``.
        rotary: of the model.

    """
    # Rounded first, so that the inverse is that of the matrix that is stored.
    transform = balanced_transform(covariance.cpu(), metric.cpu()).to(MATRIX_DTYPE)
    device = key_mean.device
    return LayerScales(
        key_mean=key_mean.float(),
        key_first=key_first.float(),
        key_transform=transform.float().contiguous().to(device),
        key_inverse=torch.linalg.inv(transform.double()).float().contiguous().to(device),
        value_size=value_size.clamp_min(torch.finfo(torch.float32).tiny).float(),
        value_mirror=mirror_to_constant(value_direction.cpu()).float().to(device),
        rotary=rotary,
    )


def directions(value: Tensor) -> Tensor:
    """Return values [..., channels] of length 1, zeros where they are zeros."""
    return torch.nn.functional.normalize(value, dim=-1, eps=torch.finfo(torch.float32).tiny)


def grouped(query: Tensor, kv_heads: int) -> Tensor:
    """Return queries [n, num_heads, head_dim] as [num_kv_heads, group * n, head_dim]."""
    return query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def query_weights(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    seen: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return ``w_t = sum_j a_tj^2 |v_j - o_t|^2`` of causal attention, over all keys j but the first.

    Args:
        positions: see `attention_of`, as the rest.
        query: of some tokens.
        key: of the whole sequence.
        value: likewise.
        scaling: of logits.
        seen: by each query.
        sinks: of the heads.

    Returns:
        [num_kv_heads, group * queries], heads of a group one after the other.

    """
    attention, distance = attention_of(positions, query, key, value, scaling, seen, sinks)
    return attention.square_().mul_(distance)[..., 1:].sum(-1)


def attention_of(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    seen: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the probabilities ``a_tj`` of causal attention, and how far values lie from outputs, ``|v_j - o_t|^2``.

    Args:
        positions: [queries], integers; where in the sequence the queries stand.
        query: [queries, num_heads, head_dim], floating point.
        key: [tokens, num_kv_heads, head_dim], of the whole sequence, in the queries' dtype; ``value`` likewise.
        value: see ``key``.
        scaling: what ``q . k`` is multiplied by; None: 1 / sqrt(head_dim).
        seen: bool [queries, tokens], what each query sees; None: all up to its own token.
        sinks: [num_heads], floating point, a logit of each head that joins the sum in the softmax and brings no value,
            so that probabilities add up to less than 1 (gpt-oss); None: there are none.

    Returns:
        [num_kv_heads, group * queries, tokens] twice, heads of a group one after the other.

    """
    tokens, kv_heads, dim = key.shape
    keys, values = key.transpose(0, 1), value.transpose(0, 1)
    hidden = torch.arange(tokens, device=key.device) > positions[:, None] if seen is None else ~seen
    logits = torch.bmm(grouped(query, kv_heads), keys.mT).mul_(1 / math.sqrt(dim) if scaling is None else scaling)
    logits = logits.unflatten(1, (-1, len(positions))).masked_fill_(hidden, -math.inf)
    if sinks is not None:
        sink = sinks.to(logits).view(kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], -1)
    attention = logits.flatten(1, 2).softmax(-1)[..., :tokens]
    output = torch.bmm(attention, values)
    # |v - o|^2 expanded, so that no [queries, tokens, head_dim] tensor is needed; rounding may leave it below 0.
    distance = torch.baddbmm(values.square().sum(-1)[:, None], output, values.mT, alpha=-2)
    distance += output.square().sum(-1, keepdim=True)
    return attention, distance.clamp_min_(0)


def average_over_positions(matrix: Tensor, rotary: Rotary, positions: int | None = None) -> Tensor:
    """Return the mean of ``R_p M R_p^T`` over the positions p from 0 on, where R_p turns by p positions.

    With a pair of channels as a complex number ``z = first + i second``, turning multiplies it by ``e^(i p f)``, f its
    frequency. So ``E[z_j conj(z_k)]`` takes the mean of ``e^(i p (f_j - f_k))`` as a factor, and ``E[z_j z_k]`` that of
    ``e^(i p (f_j + f_k))``; both means are geometric sums.

    Args:
        matrix: float64 [heads, head_dim, head_dim], symmetric, of vectors at position 0; on any device.
        rotary: how positions turn them.
        positions: how many; None: ``rotary.max_position``.

    """
    first, second = (channels.to(matrix.device) for channels in rotary.channels())
    aa, ab = matrix[:, first][:, :, first], matrix[:, first][:, :, second]
    ba, bb = matrix[:, second][:, :, first], matrix[:, second][:, :, second]
    frequency = rotary.inv_freq.to(matrix.device, torch.float64)
    count = rotary.max_position if positions is None else positions
    hermitian = torch.complex(aa + bb, ba - ab) * _mean_phase(frequency[:, None] - frequency, count)
    symmetric = torch.complex(aa - bb, ba + ab) * _mean_phase(frequency[:, None] + frequency, count)
    result = torch.empty_like(matrix)
    total, difference = (hermitian + symmetric) / 2, (hermitian - symmetric) / 2
    for rows, columns, part in (
        (first, first, total.real),
        (second, first, total.imag),
        (first, second, -difference.imag),
        (second, second, difference.real),
    ):
        result[:, rows[:, None], columns] = part
    return result


def _mean_phase(angle: Tensor, count: int) -> Tensor:
    """Return the mean of ``e^(i p angle)`` over p = 0 .. count - 1, complex.

    The geometric sum as Dirichlet's kernel, ``e^(i (count - 1) angle / 2) sin(count angle / 2) / sin(angle / 2)``, has
    no cancellation near angle 0, where it is the count.
    """
    half = angle / 2
    whole = half.sin().abs() < 1e-12
    size = (count * half).sin() / (count * torch.where(whole, 1.0, half.sin()))
    phase = (count - 1) * half
    size, phase = torch.where(whole, 1.0, size), torch.where(whole, 0.0, phase)
    return torch.polar(torch.ones_like(phase), phase) * size
