"""Chooses the range that 4-bit codes of a key or value cover: where to clip, and how much each error matters.

Uniform codes of few bits trade rounding error (a wide range has large steps) against clipping error. The smallest
weighted sum of the errors' third powers gave a lower KL divergence than the minimum and maximum or any percentile on
both reference models, but long-context retrieval at 4 bits suffers from clipped keys; docs/kv-calibration.md has both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ERROR_POWER = 3
"""p of the errors' p-th powers. Squares clip so much that the elements beyond the range, which attention singles out,
are lost; larger powers approach the minimum and maximum."""
STEPS = 16
LARGEST_CUT = 0.45
"""Share of the range that may be cut from one end; 0.45 from both still leaves a tenth."""
ROUNDS = 2
LAST_RESORT_SPAN = 1e-4
"""Span of a channel that never varies, as a share of its own size."""


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the scale and zero whose codes 0 and 2**bits - 1 read as ``low`` and ``high``.

    A channel that never varies gets a span small against its own size but wide enough for float32 to hold it: its one
    value is then still read back.

    Args:
        low: lower ends, any shape.
        high: upper ends, of the same shape, none below its lower end.
        bits: bits of a code.

    Returns:
        scale, positive, and zero; float32, shaped as the inputs.

    """
    low, high = low.double(), high.double()
    floor = LAST_RESORT_SPAN * torch.maximum(low.abs(), high.abs()).clamp_min(1e-6)
    scale = ((high - low).clamp_min(floor) / (2**bits - 1)).float()
    return scale, (-low / scale.double()).float()


def read_back(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return what ``x`` is read as after it was stored in codes that cover ``low`` to ``high``.

    Args:
        x: [tokens, ...], floating point.
        low: lower ends, broadcastable against x.
        high: upper ends, above the lower ones.
        bits: bits of a code.

    """
    step = (high - low) / (2**bits - 1)
    return ((x - low) / step).round().clamp_(0, 2**bits - 1) * step + low


def search_range(sample: Tensor, weight: Tensor | None, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return each channel's range with the smallest weighted error, searched inwards from ``low`` and ``high``.

    Both ends move independently: one is searched over a grid while the other rests, ROUNDS times. The error of a
    channel is ``sum_j weight_j * |x_j - read_back(x_j)|**3``, an Lp norm as in LAPQ (Nahshan et al. 2021, "Loss aware
    post-training quantization", section 4.1). The untouched range is in the grid and is replaced only by a smaller
    error, so the result's error never exceeds that of the minimum and maximum, and a channel without weight keeps them.

    Args:
        sample: [tokens, channels], float32.
        weight: how much each element's error matters, not negative, broadcastable against the sample; None: equally.
        low: [channels], float32, at most the sample's minimum.
        high: [channels], float32, at least the sample's maximum.
        bits: bits of a code.

    Returns:
        The lower and upper ends, float32 [channels].

    """
    span = high - low
    varies = span > LAST_RESORT_SPAN * torch.maximum(low.abs(), high.abs()).clamp_min(1e-6)
    # One value has nothing to clip; any positive span keeps the arithmetic below finite.
    span = torch.where(varies, span, torch.ones_like(span))
    cuts = [torch.zeros_like(span), torch.zeros_like(span)]
    grid = torch.linspace(0, LARGEST_CUT, STEPS, device=sample.device).tolist()
    for _ in range(ROUNDS):
        for end in (0, 1):
            best = torch.full_like(span, math.inf)
            chosen = torch.zeros_like(span)
            for cut in grid:
                trial = [torch.full_like(span, cut) if index == end else cuts[index] for index in (0, 1)]
                error = read_back(sample, low + span * trial[0], low + span * (1 - trial[1]), bits)
                # Measured in spans: third powers of small numbers would leave float32's range.
                error = error.sub_(sample).div_(span).abs_().pow_(ERROR_POWER)
                total = (error if weight is None else error.mul_(weight)).sum(0)
                better = total < best
                best = torch.where(better, total, best)
                chosen = torch.where(better, trial[end], chosen)
            cuts[end] = chosen
    return torch.where(varies, low + span * cuts[0], low), torch.where(varies, high - span * cuts[1], high)


class KeyImportance:
    """How much an error in each element of one sequence's keys moves the outputs of attention.

    To first order, an error e in channel c of the key of token j moves the output of query t by
    ``a_tj (v_j - o_t) q_tc e / sqrt(head_dim)``, where a are the attention probabilities, v the values and o the
    outputs (the derivative of softmax). Errors of different elements are taken as independent, so that their squares
    add up, and the sum over the queries of a KV head's group gives the weight of the element:
    ``w_jc = sum_t a_tj**2 |v_j - o_t|**2 q_tc**2``. It is the diagonal of the Gauss-Newton matrix of the attention
    output, in the role that the Fisher information of the loss has in KVQuant (Hooper et al. 2024, section 3.4).
    """

    def __init__(self, positions: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Compute the attention of some of a sequence's queries.

        Args:
            positions: [queries], integers; where in the sequence the queries stand.
            query: [queries, num_heads, head_dim], float32.
            key: [tokens, num_kv_heads, head_dim], float32, of the whole sequence.
            value: [tokens, num_kv_heads, head_dim], float32.

        """
        _, heads, dim = query.shape
        tokens, kv_heads, _ = key.shape
        self._heads = (kv_heads, heads // kv_heads)
        grouped = self._grouped(query)
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        future = torch.arange(tokens, device=key.device) > positions[:, None]
        logits = torch.bmm(grouped, keys.transpose(1, 2)).mul_(1 / math.sqrt(dim))
        attention = logits.masked_fill_(future.repeat(self._heads[1], 1), -math.inf).softmax(-1)
        output = torch.bmm(attention, values)
        # |v - o|^2 expanded, so that no [queries, tokens, head_dim] tensor is needed; rounding may leave it below 0.
        distance = torch.baddbmm(values.square().sum(-1)[:, None], output, values.transpose(1, 2), alpha=-2)
        distance += output.square().sum(-1, keepdim=True)
        self._moved = attention.square_().mul_(distance.clamp_min_(0)).transpose(1, 2)

    def _grouped(self, query: Tensor) -> Tensor:
        """Return queries as [num_kv_heads, group * queries, head_dim]."""
        return query.unflatten(1, self._heads).permute(1, 2, 0, 3).flatten(1, 2)

    def weight(self, query: Tensor) -> Tensor:
        """Return the weights of the keys' elements, float32 [tokens, num_kv_heads, head_dim].

        Args:
            query: [queries, num_heads, head_dim], float32: the queries given at first, or the same turned to other
                positions, which leaves the attention as it is but not the channels' shares in it.

        """
        return torch.bmm(self._moved, self._grouped(query).square()).transpose(0, 1)

    def metric(self, query: Tensor) -> Tensor:
        """Return H of the cost ``e^T H e`` of an error e, the same for all tokens, in a head's keys.

        Args:
            query: as for `weight`.

        Returns:
            float32 [num_kv_heads, head_dim, head_dim]; its diagonal is the sum of the weights over the tokens.

        """
        grouped = self._grouped(query)
        return torch.bmm((grouped * self._moved.sum(1)[..., None]).transpose(1, 2), grouped)
