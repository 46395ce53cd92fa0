"""Calibrates the KV-cache scales of every static format from the queries, keys and values that a model produces.

A forward pass over some text hands each layer's tensors to `KVCalibrator.observe`; `KVCalibrator.finish` then chooses
one scale and zero per channel of each KV head (or one per layer, for the per-tensor formats): codes of 6 and 8 bits
cover all that was seen, those of 4 bits what kv_cache/clip_search.py chooses.

Rotary embedding turns a pair of channels by an angle that grows with the position, so that keys fill ranges at
position 8,000 that they never touch below 1,000. Scales calibrated on short text therefore clip long contexts.
`Rotary` lets the calibrator turn what it saw to every position that will be served: queries and keys turned together
leave attention unchanged (RoFormer, Su et al. 2021, equation 16), so the turned tensors are those of the same text
farther on.

Keys of 4 bits with a scale for each channel are also centred and transformed, and they and such values rounded with
feedback (kv_cache/rotary.py, kv_cache/transforms.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kv_cache.clip_search import KeyImportance, affine, search_range
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, KVFormat
from kv_cache.rotary import Rotary
from kv_cache.scales import MATRIX_DTYPE, KVScales, LayerScales
from kv_cache.transforms import balanced_transform, feedback

FIRST_TOKENS = 4
"""Tokens at a sequence's start that always stay in the sample, and at their own positions: attention sinks (Xiao et
al. 2023, "Efficient streaming language models with attention sinks", which keeps 4) occur nowhere else."""
TURNS = 8
"""Positions over which a layer's kept sequences are spread at least, together."""
RANGE_TURNS = 32
"""Positions to which the first sequence is turned for the exact range; the n-th gets an n-th of them, at least one."""
MAX_ROWS = 4096
"""Tokens that a search for one range looks at."""
EXACT_BITS = 6
"""From so many bits on codes cover all that was seen: clipping gained nothing there and could lose a rare outlier."""

SERVED_TOKENS = 1_000_000
"""Tokens that 8-bit codes shall cover per channel; calibration sees fewer, and steps so small leave room for more."""

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Sequence:
    """A kept sequence of one layer, bfloat16, and the draw that kept it."""

    draw: float
    positions: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class _Layer:
    """What is kept of one layer: exact ranges and a few sequences."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.key_range: Range | None = None
        self.value_range: Range | None = None
        self.sequences: list[_Sequence] = []
        self.seen = 0
        self.turned = 0
        self.tokens = 0
        self.longest = 0
        self.value_metric: Tensor | None = None


class KVCalibrator:
    """Collects one model's queries, keys and values layer by layer and turns them into `KVScales`.

    Memory, on the tensors' own device: for each layer at most ``max_tokens`` tokens of keys and values and
    ``max_queries`` queries for each kept sequence, in bfloat16, which is 4 * num_kv_heads * head_dim bytes a token:
    4 MiB a layer for 2 heads of 64 channels at the defaults, 32 MiB (1 GiB for 32 layers) for 8 heads of 128. While
    it finishes a layer, `finish` takes about ten times that layer's share on top.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        seed: int = 0,
        *,
        rotary: Rotary | None = None,
        max_tokens: int = 8192,
        max_queries: int = 128,
    ) -> None:
        """Prepare for a model's shape.

        Args:
            num_layers: decoder layers with a KV cache.
            num_kv_heads: KV heads of a layer.
            head_dim: channels of a head.
            seed: which sequences, queries and tokens the searches see.
            rotary: how positions turn queries and keys. Without it the scales fit contexts as long as the observed
                sequences, and a model with rotary embedding loses quality beyond them.
            max_tokens: tokens kept of each layer.
            max_queries: queries kept of each kept sequence.

        Raises:
            ParetoError: a size is not positive, or rotary does not fit head_dim.

        """
        if min(num_layers, num_kv_heads, head_dim, max_queries) < 1 or max_tokens <= FIRST_TOKENS:
            raise ParetoError(
                "KV calibration: the numbers of layers, heads, channels, tokens and queries must be positive"
            )
        if rotary is not None and (
            rotary.max_position < 1 or rotary.inv_freq.dim() != 1 or 2 * rotary.inv_freq.numel() > head_dim
        ):
            raise ParetoError(
                f"KV calibration: rotary frequencies {tuple(rotary.inv_freq.shape)} for {rotary.max_position} "
                f"positions do not fit heads of {head_dim} channels"
            )
        self.num_layers, self.num_kv_heads, self.head_dim, self.seed = num_layers, num_kv_heads, head_dim, seed
        self.rotary, self.max_tokens, self.max_queries = rotary, max_tokens, max_queries
        self._layers = [_Layer(seed * 1_000_003 + index) for index in range(num_layers)]

    @torch.no_grad()
    def observe(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Take one sequence's tensors of one layer; its first token must be the sequence's first.

        Args:
            layer: index of the layer, from 0.
            query: [tokens, num_heads, head_dim], floating point, after RoPE, before the softmax's scale.
            key: [tokens, num_kv_heads, head_dim], floating point, after RoPE.
            value: [tokens, num_kv_heads, head_dim], floating point.

        Raises:
            ParetoError: there is no such layer, a shape is wrong, or a number is not finite.

        """
        self._check(layer, query, key, value)
        record, tokens = self._layers[layer], key.shape[0]
        if self.rotary is None:
            record.key_range = _widen(record.key_range, key)
        else:
            room = max(0, self.rotary.max_position - tokens)
            for _ in range(max(1, RANGE_TURNS // (record.seen + 1)) if room else 1):
                # The first position, the last, then a golden-ratio sequence, which leaves no gap wherever it stops.
                share = (0.0, 1.0)[record.turned] if record.turned < 2 else record.turned * 0.6180339887498949 % 1
                record.key_range = _widen(record.key_range, _turn_keys(self.rotary, key.float(), round(share * room)))
                record.turned += 1
        record.value_range = _widen(record.value_range, value)
        record.seen += 1
        record.tokens += tokens
        record.longest = max(record.longest, tokens)
        self._keep(record, query, key, value)

    def weigh_values(self, layer: int, metric: Tensor) -> None:
        """Say how much errors of a layer's values matter together; without it each channel is rounded by itself.

        Args:
            layer: index of the layer, from 0.
            metric: float [num_kv_heads, head_dim, head_dim], positive semidefinite: an error e of a value costs
                ``e^T metric e``, for instance the sum of ``W_o^T W_o`` over the query heads of the KV head.

        Raises:
            ParetoError: there is no such layer, or the shape is wrong.

        """
        shape = (self.num_kv_heads, self.head_dim, self.head_dim)
        if not 0 <= layer < self.num_layers or tuple(metric.shape) != shape:
            raise ParetoError(f"KV calibration: layer {layer} of {self.num_layers} takes a metric of shape {shape}")
        self._layers[layer].value_metric = metric.detach().double().cpu()

    def _check(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if not 0 <= layer < self.num_layers:
            raise ParetoError(f"KV calibration: there is no layer {layer}; the model has {self.num_layers}")
        where = f"KV calibration, layer {layer}"
        shape = (key.shape[0], self.num_kv_heads, self.head_dim)
        if tuple(key.shape) != shape or tuple(value.shape) != shape or key.shape[0] == 0:
            raise ParetoError(
                f"{where}: keys {tuple(key.shape)} and values {tuple(value.shape)} must both be "
                f"[tokens, {self.num_kv_heads}, {self.head_dim}] with at least one token"
            )
        heads = query.shape[1] if query.dim() == 3 else 0
        if tuple(query.shape) != (shape[0], heads, self.head_dim) or heads == 0 or heads % self.num_kv_heads:
            raise ParetoError(
                f"{where}: queries {tuple(query.shape)} must be [{shape[0]}, num_heads, {self.head_dim}] with a "
                f"multiple of {self.num_kv_heads} heads"
            )
        for name, tensor in (("queries", query), ("keys", key), ("values", value)):
            if not tensor.isfinite().all():
                raise ParetoError(f"{where}: the {name} hold NaN or infinity")

    def _keep(self, record: _Layer, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep the sequence if its seeded draw is among the highest, of which as many stay as fit."""
        draw = float(torch.rand((), generator=record.generator))
        full = sum(len(kept.key) for kept in record.sequences) >= self.max_tokens
        if full and draw < record.sequences[-1].draw:
            return
        tokens, device = key.shape[0], key.device
        if self.rotary is not None:
            # A beginning is enough, since it can be turned to later positions; a quarter leaves room for other text.
            chosen = torch.arange(min(tokens, max(self.max_tokens // 4, FIRST_TOKENS + 1)), device=device)
        else:
            chosen = _rows(tokens, torch.arange(min(FIRST_TOKENS, tokens)), self.max_tokens, record.generator).to(
                device
            )
        positions = torch.randperm(len(chosen), generator=record.generator)[: self.max_queries].sort().values.to(device)
        kept = [tensor.index_select(0, chosen).to(torch.bfloat16) for tensor in (key, value)]
        asked = query.index_select(0, chosen[positions]).to(torch.bfloat16)
        record.sequences.append(_Sequence(draw, positions, asked, kept[0], kept[1]))
        record.sequences.sort(key=lambda sequence: -sequence.draw)
        while len(record.sequences) > 1 and sum(len(s.key) for s in record.sequences) > self.max_tokens:
            record.sequences.pop()

    @torch.no_grad()
    def finish(self, metadata: dict[str, Any] | None = None) -> KVScales:
        """Return the scales of every static format, float32 on the CPU.

        The metadata gain ``calibration_tokens`` (of the layer that saw most), ``calibration_seed`` and
        ``calibration_positions``: the longest context, in tokens, that the scales were fitted to.

        Args:
            metadata: JSON values to carry along with the calibration's own.

        Raises:
            ParetoError: a layer was never observed.

        """
        missing = [index for index, record in enumerate(self._layers) if not record.seen]
        if missing:
            raise ParetoError(
                f"KV calibration: no keys and values of layer {', '.join(map(str, missing))} were observed; "
                f"run at least one sequence through all {self.num_layers} layers"
            )
        layers: dict[str, list[LayerScales]] = {name: [] for name, fmt in FORMATS.items() if fmt.static}
        centred = False
        for record in self._layers:
            chosen = self._ranges(record)
            refined = self._refined_keys(record)
            centred = centred or "key_mean" in refined
            for name, scales in layers.items():
                fmt = FORMATS[name]
                pairs: list[Tensor] = []
                for side, bits in (("key", fmt.key_bits), ("value", fmt.value_bits)):
                    low, high = chosen[side, bits, fmt.granularity]
                    for tensor in affine(low, high, bits):
                        spread = tensor.expand(self.num_kv_heads * self.head_dim)
                        pairs.append(spread.reshape(self.num_kv_heads, self.head_dim).cpu().contiguous())
                scales.append(self._refine(fmt, record, LayerScales(*pairs), refined))
        positions = max(record.longest for record in self._layers)
        if self.rotary is not None:
            positions = max(positions, self.rotary.max_position)
        made = {
            "calibration_tokens": max(record.tokens for record in self._layers),
            "calibration_seed": self.seed,
            "calibration_positions": positions,
        }
        return KVScales(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            layers=layers,
            metadata={**(metadata or {}), **made},
            rotary=self.rotary if centred else None,
        )

    def _refine(self, fmt: KVFormat, record: _Layer, scales: LayerScales, refined_keys: dict[str, Any]) -> LayerScales:
        """Return a format's scales with what its sides of few bits get on top."""
        more: dict[str, Any] = {}
        if fmt.granularity == "head" and fmt.key_bits < EXACT_BITS:
            more |= refined_keys
        if fmt.granularity == "head" and fmt.value_bits < EXACT_BITS and record.value_metric is not None:
            more["value_feedback"] = _stored(feedback(record.value_metric, scales.value_scale))
        return replace(scales, **more)

    def _refined_keys(self, record: _Layer) -> dict[str, Any]:
        """Return how 4-bit keys are centred, transformed and rounded, and the scales that go with it."""
        mean = None if self.rotary is None else self._mean_key(record)
        keys, _, metric = self._key_sample(record, mean)
        keys, metric = keys.double().cpu(), metric.double().cpu()
        scattered = keys - keys.mean(0)
        covariance = torch.einsum("thc,thd->hcd", scattered, scattered) / len(keys)
        transform = _stored(balanced_transform(covariance, metric))
        sample = torch.einsum("hcd,thd->thc", transform.double(), keys).float().flatten(1)
        bits = next(fmt.key_bits for fmt in FORMATS.values() if fmt.static and fmt.key_bits < EXACT_BITS)
        low, high = search_range(sample, None, sample.amin(0), sample.amax(0), bits)
        scale, zero = (x.view(self.num_kv_heads, self.head_dim) for x in affine(low, high, bits))
        inverse = torch.linalg.inv(transform.double())
        refined = {
            "key_scale": scale,
            "key_zero": zero,
            "key_transform": transform,
            "key_inverse": inverse.float(),
            "key_feedback": _stored(feedback(inverse.mT @ metric @ inverse, scale)),
        }
        return refined if mean is None else refined | {"key_mean": mean.cpu(), "rotary": self.rotary}

    def _mean_key(self, record: _Layer) -> Tensor:
        """Return the mean over the kept tokens of keys turned back to position 0, float32 [num_kv_heads, head_dim]."""
        assert self.rotary is not None
        back = [self.rotary.turn(s.key.float(), -torch.arange(len(s.key))) for s in record.sequences]
        later = torch.cat([keys[FIRST_TOKENS:] for keys in back])
        mean = later.mean(0) if len(later) else torch.cat(back).mean(0)
        # Only a rotated channel's mean depends on the position; the zero takes care of the others.
        mean[:, 2 * self.rotary.inv_freq.numel() :] = 0
        return mean

    def _ranges(self, record: _Layer) -> dict[tuple[str, int, str], Range]:
        """Return one layer's ranges by ("key" or "value", bits, granularity); each end is [channels of all heads]."""
        assert record.key_range is not None
        assert record.value_range is not None
        keys, importance, _ = self._key_sample(record)
        values = torch.cat([sequence.value for sequence in record.sequences]).float()
        rows = self._sample_rows(record, 1).to(values.device)
        values = values[rows].flatten(1)
        sides: dict[str, tuple[Range, Tensor, Tensor | None]] = {
            "key": (_widen(record.key_range, keys), keys.flatten(1), importance.flatten(1)),
            # Weighting values by the attention that their tokens receive gained nothing.
            "value": (record.value_range, values, None),
        }
        ranges: dict[tuple[str, int, str], Range] = {}
        for fmt in FORMATS.values():
            for side, bits in (("key", fmt.key_bits), ("value", fmt.value_bits)):
                if not fmt.static or (side, bits, fmt.granularity) in ranges:
                    continue
                (low, high), sample, weight = sides[side]
                low, high = low.flatten(), high.flatten()
                if fmt.granularity == "tensor":
                    low, high = low.min()[None], high.max()[None]
                    sample, weight = sample.reshape(-1, 1), None if weight is None else weight.reshape(-1, 1)
                if bits < EXACT_BITS:
                    low, high = search_range(sample, weight, low, high, bits)
                elif bits == 8 and fmt.granularity == "head":
                    room = _headroom(record.tokens) * (high - low)
                    low, high = low - room, high + room
                ranges[side, bits, fmt.granularity] = (low, high)
        return ranges

    def _key_sample(self, record: _Layer, mean: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, turned to positions spread over the context, and what their errors cost.

        Args:
            record: the layer.
            mean: [num_kv_heads, head_dim] before rotary embedding; its centres are taken off the keys returned.

        Returns:
            keys and their elements' importance, float32 [tokens, num_kv_heads, head_dim], and the metric of errors
            of whole keys, [num_kv_heads, head_dim, head_dim].

        """
        count = len(record.sequences)
        turns = 1
        if self.rotary is not None:
            # Little text is turned to more positions, until there is enough for a full sample.
            kept_tokens = sum(len(sequence.key) for sequence in record.sequences)
            turns = min(RANGE_TURNS, max(-(-TURNS // count), -(-MAX_ROWS // kept_tokens)))
        rows = self._sample_rows(record, turns)
        keys, weights, start = [], [], 0
        metric = torch.zeros(self.num_kv_heads, self.head_dim, self.head_dim)
        for index, kept in enumerate(record.sequences):
            query, key, value = kept.query.float(), kept.key.float(), kept.value.float()
            importance = KeyImportance(kept.positions, query, key, value)
            positions = torch.arange(len(key))
            for turn in range(turns):
                turned, asked = key, query
                if self.rotary is not None:
                    share = (turn * count + index) / max(1, turns * count - 1)
                    offset = round(share * max(0, self.rotary.max_position - len(key)))
                    turned, asked = _turn_keys(self.rotary, key, offset), self.rotary.turn(query, offset)
                    positions = torch.arange(len(key)) + offset * (torch.arange(len(key)) >= FIRST_TOKENS)
                mine = (rows[(rows >= start) & (rows < start + len(key))] - start).to(key.device)
                chosen = turned[mine]
                if mean is not None and self.rotary is not None:
                    table = self.rotary.table(self.rotary.max_position + len(key))
                    chosen = chosen - table.centre(mean.cpu(), positions[mine.cpu()]).to(key.device)
                keys.append(chosen)
                weights.append(importance.weight(asked)[mine])
                metric += importance.metric(asked).cpu()
                start += len(key)
        return torch.cat(keys), torch.cat(weights), metric

    def _sample_rows(self, record: _Layer, turns: int) -> Tensor:
        """Return which of the kept tokens, each sequence's repeated ``turns`` times, a search looks at, in order."""
        lengths = [len(sequence.key) for sequence in record.sequences for _ in range(turns)]
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        first = torch.cat(
            [start + torch.arange(min(FIRST_TOKENS, n)) for start, n in zip(starts, lengths, strict=True)]
        )
        generator = torch.Generator().manual_seed(self.seed)
        return _rows(sum(lengths), first, MAX_ROWS, generator)


def _turn_keys(rotary: Rotary, key: Tensor, offset: int) -> Tensor:
    """Return keys moved ``offset`` positions on, but for the first tokens, which only ever are first."""
    return torch.cat((key[:FIRST_TOKENS], rotary.turn(key[FIRST_TOKENS:], offset)))


def _rows(count: int, always: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Return at most ``limit`` of the rows 0..count-1, in order: those always wanted, then a seeded choice."""
    if count <= limit:
        return torch.arange(count)
    draw = torch.rand(count, generator=generator)
    draw[always] = 2.0
    return draw.topk(limit).indices.sort().values


def _stored(matrix: Tensor) -> Tensor:
    """Return a matrix as it comes back from the file."""
    return matrix.to(MATRIX_DTYPE).float()


def _headroom(tokens: int) -> float:
    """Return by which share of its span a range over ``tokens`` tokens grows at each end to cover SERVED_TOKENS.

    The largest of n draws from a normal distribution lies about ``sqrt(2 ln n)`` deviations from the mean (Embrechts,
    Klueppelberg and Mikosch 1997, "Modelling extremal events", example 3.3.29).
    """
    seen, served = (math.sqrt(2 * math.log(max(2, count))) for count in (tokens, SERVED_TOKENS))
    return max(0.0, served / seen - 1) / 2


def _widen(seen: Range | None, tensor: Tensor) -> Range:
    """Return the minimum and maximum over tokens, float32 [num_kv_heads, head_dim], widened by what was seen before."""
    low, high = (bound.float() for bound in tensor.aminmax(dim=0))
    return (low, high) if seen is None else (torch.minimum(seen[0], low), torch.maximum(seen[1], high))


__all__ = ["KVCalibrator"]
