"""Calibrates the KV-cache scales (kv_cache/scales.py) from the queries, keys and values that a model produces.

A forward pass over some text hands each layer's tensors to `KVCalibrator.observe`, which keeps sums only, and `finish`
makes the scales of them:

- The centre of keys is their mean, turned back to position 0. The first token's key is of another kind than all others
  (an attention sink, Xiao et al. 2023) and has a mean of its own; it is left out of everything else.
- The transform balances the covariance of keys against what their errors cost (kv_cache/transforms.py). To first order,
  an error e of key j moves the output o of query t by ``a_tj (v_j - o_t) (q_t . e)``, where a are the attention
  probabilities and v the values (the derivative of softmax; a sink is one more key, whose value is 0). Summed over keys
  and queries, the squares are ``e^T H e`` with ``H = sum_t w_t q_t q_t^T`` and
  ``w_t = sum_j a_tj^2 |v_j - o_t|^2``: the Gauss-Newton matrix of the attention output, in the role that the Fisher
  information of the loss has in KVQuant (Hooper et al. 2024, section 3.4).
- Of values, the root mean square and the direction in which most of them lie.

Rotary embedding turns pairs of channels by angles that grow with the position, so keys and queries at position 8,000
point elsewhere than those of short text. Turned together they leave attention unchanged (RoFormer, Su et al. 2021,
equation 16), so both are turned back to position 0, and covariance and H are averaged over all positions that will be
served (kv_cache/moments.py, `average_over_positions`): short text calibrates long contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from kv_cache.moments import average_over_positions, directions, grouped, query_weights, scales_of_moments
from kv_cache.rotary import Rotary
from kv_cache.scales import KVScales, LayerScales
from kv_cache.tf32 import tf32

QUERIES = 128
"""Queries of a sequence that H looks at."""
MAX_PROBABILITIES = 1 << 25
"""Attention probabilities that are computed at once, which bounds memory for long sequences."""


class _Layer:
    """The sums over what was seen of one layer, float64 but for the shift, on the device of what was seen last."""

    def __init__(self, heads: int, dim: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = 0
        # Of the first token's key: in sequences of one token, and in longer ones.
        self.first = [torch.zeros(heads, dim, dtype=torch.float64) for _ in range(2)]
        self.firsts = [0, 0]
        # Of all later tokens. Keys are summed less a shift near their mean, without which the products of keys with
        # large biases would drown their covariance in float32.
        self.shift: Tensor | None = None
        self.later = 0
        self.key = torch.zeros(heads, dim, dtype=torch.float64)
        self.key_product = torch.zeros(heads, dim, dim, dtype=torch.float64)
        self.metric = torch.zeros(heads, dim, dim, dtype=torch.float64)
        self.value_square = torch.zeros(heads, dtype=torch.float64)
        self.value_direction = torch.zeros(heads, dim, dim, dtype=torch.float64)

    def to(self, device: torch.device) -> None:
        """Move the sums to a device; on a GPU, sums on the CPU would make it wait for each sequence."""
        if self.key.device != device:
            self.first = [sum_.to(device) for sum_ in self.first]
            for name, sum_ in vars(self).items():
                if isinstance(sum_, Tensor):
                    setattr(self, name, sum_.to(device))


@dataclass(frozen=True, eq=False)
class LayerShape:
    """What one layer's keys and values are like.

    Attributes:
        num_kv_heads: KV heads of the layer.
        head_dim: channels of a head.
        rotary: how positions turn queries and keys; `Rotary.over` makes one also for a layer that turns only a part of
            the channels, or none. One object for all layers that have the same.

    Raises:
        ParetoError: a size is not positive, or rotary does not fit head_dim.

    """

    num_kv_heads: int
    head_dim: int
    rotary: Rotary

    def __post_init__(self) -> None:
        if min(self.num_kv_heads, self.head_dim) < 1:
            raise ParetoError("KV calibration: the numbers of heads and channels must be positive")
        if 2 * self.rotary.inv_freq.numel() != self.head_dim:
            raise ParetoError(
                f"KV calibration: {self.rotary.inv_freq.numel()} rotary frequencies do not fit heads of "
                f"{self.head_dim} channels"
            )


class KVCalibrator:
    """Sums up one model's queries, keys and values layer by layer and turns the sums into `KVScales`.

    Tensors may lie on any device. What is kept lies there too: three matrices of float64 [head_dim, head_dim] for each
    KV head of each layer, 96 MiB for 32 layers of 8 heads of 128 channels.
    """

    def __init__(self, shapes: Sequence[LayerShape | None], seed: int = 0, *, queries: int = QUERIES) -> None:
        """Prepare for a model's layers.

        Args:
            shapes: of each decoder layer; None for one that gets no scales.
            seed: which queries are looked at.
            queries: how many queries of a sequence are looked at.

        Raises:
            ParetoError: no layer gets scales, or no queries.

        """
        if not any(shapes) or queries < 1:
            raise ParetoError("KV calibration: the numbers of layers and queries must be positive")
        self.shapes, self.seed, self.queries = list(shapes), seed, queries
        self._layers = [
            None if shape is None else _Layer(shape.num_kv_heads, shape.head_dim, seed * 1_000_003 + index)
            for index, shape in enumerate(shapes)
        ]

    def turned_by(self, layer: int, rotary: Rotary) -> None:
        """Let a layer that nothing has been observed of have another rotary embedding."""
        shape = self.shapes[layer]
        assert shape is not None
        assert not self._record(layer).tokens
        self.shapes[layer] = replace(shape, rotary=rotary)

    def _record(self, layer: int) -> _Layer:
        record = self._layers[layer]
        assert record is not None
        return record

    @torch.no_grad()
    def observe(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Take a layer's tensors of one sequence, or of several of one length, each from its first position on.

        Sequences of one token say what keys at position 0 are like, and nothing else. Where there are any, they alone
        say it: which tokens come first in service, the caller knows better than the cuts of a calibration text.

        Args:
            layer: index of the layer, from 0.
            query: [tokens, num_heads, head_dim] or [sequences, tokens, num_heads, head_dim], floating point, after
                RoPE; logits are ``q . k / sqrt(head_dim)``.
            key: [..., tokens, num_kv_heads, head_dim], floating point, after RoPE.
            value: [..., tokens, num_kv_heads, head_dim], floating point.
            mask: bool [sequences or 1, 1, tokens, tokens], which tokens (last dimension) each token sees; None: all up
                to its own.
            sinks: [num_heads], floating point; see `attention_of`. None: there are none.

        Raises:
            ParetoError: there is no such layer, a shape is wrong, or a number is not finite.

        """
        # One check for all sequences: on a GPU each one waits until everything before it is done.
        shape = self._check(layer, query, key, value, mask, sinks)
        query, key, value = (x[None] if x.dim() == 3 else x for x in (query, key, value))
        record, (sequences, tokens) = self._record(layer), key.shape[:2]
        record.to(key.device)
        record.tokens += sequences * tokens
        several = int(tokens > 1)
        record.first[several] += key[:, 0].double().sum(0)
        record.firsts[several] += sequences
        if several:
            seen = [None] * sequences if mask is None else mask[:, 0].expand(sequences, -1, -1)
            for sequence in zip(query, key, value, seen, strict=True):
                self._add(record, shape, *sequence, sinks)

    def _add(
        self,
        record: _Layer,
        shape: LayerShape,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        """Sum up one sequence's tokens but the first, shapes as `observe` takes them; seen: [tokens, tokens]."""
        key, value, tokens = key.float(), value.float(), len(key)
        with tf32(False):
            positions = torch.arange(1, tokens, device=key.device)
            turned = shape.rotary.turn(key[1:], -positions)
            if record.shift is None:
                record.shift = turned.mean(0)
            turned -= record.shift
            record.later += tokens - 1
            record.key += turned.sum(0, dtype=torch.float64)
            rows = turned.transpose(0, 1)
            record.key_product += torch.bmm(rows.mT, rows)
            record.value_square += value[1:].square().mean(-1).sum(0, dtype=torch.float64)
            rows = directions(value[1:]).transpose(0, 1)
            record.value_direction += torch.bmm(rows.mT, rows)
            chosen = torch.randperm(tokens, generator=record.generator)[: self.queries].sort().values.to(key.device)
            view = None if seen is None else seen[chosen]
            record.metric += _metric(shape.rotary, chosen, query[chosen].float(), key, value, view, sinks)

    def _check(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> LayerShape:
        """Return the layer's shape, which the tensors fit."""
        if not 0 <= layer < len(self.shapes):
            raise ParetoError(f"KV calibration: there is no layer {layer}; the model has {len(self.shapes)}")
        expected = self.shapes[layer]
        if expected is None:
            raise ParetoError(f"KV calibration: layer {layer} gets no scales, and was observed")
        kv_heads, dim = expected.num_kv_heads, expected.head_dim
        where = f"KV calibration, layer {layer}"
        tokens = tuple(key.shape[:-2])
        shape = (*tokens, kv_heads, dim)
        if tuple(key.shape) != shape or tuple(value.shape) != shape or len(tokens) not in (1, 2) or 0 in tokens:
            raise ParetoError(
                f"{where}: keys {tuple(key.shape)} and values {tuple(value.shape)} must both be "
                f"[tokens, {kv_heads}, {dim}] with at least one token, or several sequences of such"
            )
        heads = query.shape[-2] if query.dim() == key.dim() else 0
        if tuple(query.shape) != (*tokens, heads, dim) or heads == 0 or heads % kv_heads:
            raise ParetoError(
                f"{where}: queries {tuple(query.shape)} must be [{', '.join(map(str, tokens))}, num_heads, "
                f"{dim}] with a multiple of {kv_heads} heads"
            )
        if sinks is not None and tuple(sinks.shape) != (heads,):
            raise ParetoError(f"{where}: sinks {tuple(sinks.shape)} must be one for each of {heads} query heads")
        if mask is not None:
            count = tokens[0] if len(tokens) == 2 else 1
            if mask.dtype != torch.bool or mask.shape[0] not in (1, count) or mask.shape[1:] != (1, *2 * tokens[-1:]):
                raise ParetoError(
                    f"{where}: a mask {mask.dtype} {tuple(mask.shape)} must be bool [{count} or 1, 1, {tokens[-1]}, "
                    f"{tokens[-1]}]"
                )
        # A sink of -infinity is none.
        finite = torch.stack([tensor.isfinite().all() for tensor in (query, key, value)])
        if not finite.all():
            bad = ("queries", "keys", "values")[finite.tolist().index(False)]
            raise ParetoError(f"{where}: the {bad} hold NaN or infinity")
        return expected

    @torch.no_grad()
    def finish(self, metadata: dict[str, Any] | None = None) -> KVScales:
        """Return the scales, float32 on the CPU.

        The metadata gain ``calibration_tokens`` (of the layer that saw most) and ``calibration_seed``.

        Args:
            metadata: JSON values to carry along with the calibration's own.

        Raises:
            ParetoError: a layer was never observed, or in sequences of one token only.

        """
        records = [record for record in self._layers if record is not None]
        missing = [index for index, record in enumerate(self._layers) if record is not None and not record.later]
        if missing:
            raise ParetoError(
                f"KV calibration: no keys and values of layer {', '.join(map(str, missing))} were observed; "
                f"run at least one sequence of two tokens or more through all {len(records)} layers"
            )
        made = {
            "calibration_tokens": max(record.tokens for record in records),
            "calibration_seed": self.seed,
        }
        layers = [
            None if shape is None else _scales(self._record(index), shape.rotary)
            for index, shape in enumerate(self.shapes)
        ]
        return KVScales(layers, metadata={**(metadata or {}), **made})


def _metric(
    rotary: Rotary,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return H of some of a sequence's queries [n, num_heads, head_dim], turned back to position 0."""
    size = max(1, MAX_PROBABILITIES // (query.shape[1] * len(key)))
    heads, dim = key.shape[1:]
    metric = torch.zeros(heads, dim, dim, device=key.device)
    views = [None] * -(-len(positions) // size) if seen is None else seen.split(size)
    for part, asked, view in zip(positions.split(size), query.split(size), views, strict=True):
        weight = query_weights(part, asked, key, value, seen=view, sinks=sinks)
        rows = grouped(rotary.turn(asked, -part), heads)
        metric += torch.bmm((rows * weight[..., None]).mT, rows)
    return metric


def _scales(record: _Layer, rotary: Rotary) -> LayerScales:
    """Return one layer's scales."""
    record.to(torch.device("cpu"))
    assert record.shift is not None
    mean = record.key / record.later
    covariance = record.key_product / record.later - mean[..., None] * mean[:, None]
    one = int(not record.firsts[0])
    return scales_of_moments(
        key_mean=mean + record.shift.double(),
        key_first=record.first[one] / record.firsts[one],
        covariance=average_over_positions(covariance, rotary),
        metric=average_over_positions(record.metric, rotary),
        value_size=(record.value_square / record.later).sqrt(),
        value_direction=record.value_direction / record.later,
        rotary=rotary,
    )
