"""Calibrates the KV-cache scales of every static format from the queries, keys and values that a model produces.

A forward pass over some text hands each layer's tensors to `KVCalibrator.observe`; `KVCalibrator.finish` then chooses
one scale and zero per channel of each KV head (or per layer, for the per-tensor formats).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS
from kv_cache.scales import KVScales, LayerScales

CLIPPED_EACH_SIDE = 0.001
"""Share of a channel's elements that 4-bit codes clip on each side."""


def affine(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero (float32, shaped as the inputs) whose codes 0 and 2**bits - 1 read as low and high.

    A channel that never varies gets a range small against its own size but wide enough for float32 to hold it: its
    one value is then still read back.
    """
    low, high = low.double(), high.double()
    span = (high - low).clamp_min(1e-4 * torch.maximum(low.abs(), high.abs()).clamp_min(1e-6))
    scale = (span / (2**bits - 1)).float()
    return scale, (-low / scale.double()).float()


@dataclass
class _Layer:
    """What is kept of one layer: exact ranges and some whole sequences."""

    key_range: tuple[torch.Tensor, torch.Tensor] | None = None
    value_range: tuple[torch.Tensor, torch.Tensor] | None = None
    sequences: list[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)


class KVCalibrator:
    """Collects one model's queries, keys and values layer by layer and turns them into `KVScales`.

    Memory: at most ``max_tokens`` tokens of keys and values a layer in bfloat16, and the queries of at most
    ``max_queries`` of them, on the tensors' own device.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        seed: int = 0,
        *,
        max_tokens: int = 8192,
        max_queries: int = 128,
    ) -> None:
        self.num_layers, self.num_kv_heads, self.head_dim, self.seed = num_layers, num_kv_heads, head_dim, seed
        self.max_tokens, self.max_queries = max_tokens, max_queries
        self._layers = [_Layer() for _ in range(num_layers)]
        self._random = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in range(num_layers)]
        self._tokens = [0] * num_layers

    @torch.no_grad()
    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take one sequence's tensors of one layer; its first token must be the sequence's first.

        Args:
            layer: index of the layer, from 0.
            query: [tokens, num_heads, head_dim], floating point, after RoPE, before the softmax's scale.
            key: [tokens, num_kv_heads, head_dim], floating point, after RoPE.
            value: [tokens, num_kv_heads, head_dim], floating point.

        Raises:
            ParetoError: there is no such layer, a shape is wrong, or a number is not finite.

        """
        if not 0 <= layer < self.num_layers:
            raise ParetoError(f"KV calibration: there is no layer {layer}; the model has {self.num_layers}")
        shape = (key.shape[0], self.num_kv_heads, self.head_dim)
        if tuple(key.shape) != shape or tuple(value.shape) != shape or key.shape[0] == 0:
            raise ParetoError(
                f"KV calibration, layer {layer}: keys {tuple(key.shape)} and values {tuple(value.shape)} must both be "
                f"[tokens, {self.num_kv_heads}, {self.head_dim}] with at least one token"
            )
        heads = query.shape[1] if query.dim() == 3 else 0
        if tuple(query.shape) != (shape[0], heads, self.head_dim) or heads == 0 or heads % self.num_kv_heads:
            raise ParetoError(
                f"KV calibration, layer {layer}: queries {tuple(query.shape)} must be [{shape[0]}, num_heads, "
                f"{self.head_dim}] with a multiple of {self.num_kv_heads} heads"
            )
        for name, tensor in (("queries", query), ("keys", key), ("values", value)):
            if not tensor.isfinite().all():
                raise ParetoError(f"KV calibration, layer {layer}: the {name} hold NaN or infinity")
        record = self._layers[layer]
        record.key_range = _widen(record.key_range, key)
        record.value_range = _widen(record.value_range, value)
        self._tokens[layer] += key.shape[0]
        self._keep(layer, query, key, value)

    def _keep(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the sequence if its seeded draw is among the highest whose tokens fit."""
        record, generator = self._layers[layer], self._random[layer]
        draw = float(torch.rand((), generator=generator))
        tokens = min(key.shape[0], self.max_tokens)
        chosen = torch.randperm(tokens, generator=generator)[: self.max_queries].sort().values.to(query.device)
        record.sequences.append(
            (
                draw,
                chosen,
                query[:tokens].index_select(0, chosen).bfloat16(),
                key[:tokens].bfloat16(),
                value[:tokens].bfloat16(),
            )
        )
        record.sequences.sort(key=lambda entry: -entry[0])
        total = 0
        for index, entry in enumerate(record.sequences):
            total += entry[3].shape[0]
            if total > self.max_tokens and index:
                del record.sequences[index:]
                break

    @torch.no_grad()
    def finish(self, metadata: dict[str, Any] | None = None) -> KVScales:
        """Return the scales of every static format, float32 on the CPU.

        Args:
            metadata: JSON values to carry along with the calibration's own.

        Raises:
            ParetoError: a layer was never observed.

        """
        missing = [index for index, record in enumerate(self._layers) if not record.sequences]
        if missing:
            raise ParetoError(
                f"KV calibration: no keys and values of layer {', '.join(map(str, missing))} were observed; "
                f"run at least one sequence through all {self.num_layers} layers"
            )
        layers: dict[str, list[LayerScales]] = {name: [] for name, fmt in FORMATS.items() if fmt.static}
        for record in self._layers:
            assert record.key_range is not None
            assert record.value_range is not None
            keys = torch.cat([entry[3] for entry in record.sequences]).float()
            values = torch.cat([entry[4] for entry in record.sequences]).float()
            for name, scales in layers.items():
                fmt = FORMATS[name]
                pairs = []
                for sample, exact, bits in (
                    (keys, record.key_range, fmt.key_bits),
                    (values, record.value_range, fmt.value_bits),
                ):
                    low, high = exact if bits > 4 else _percentiles(sample, CLIPPED_EACH_SIDE)
                    if fmt.granularity == "tensor":
                        low, high = low.min().expand_as(low), high.max().expand_as(high)
                    pairs += [tensor.cpu().contiguous() for tensor in affine(low, high, bits)]
                scales.append(LayerScales(*pairs))
        tokens = {"calibration_tokens": max(self._tokens), "calibration_seed": self.seed}
        return KVScales(
            self.num_layers, self.num_kv_heads, self.head_dim, layers=layers, metadata={**tokens, **(metadata or {})}
        )


def _widen(seen: tuple[torch.Tensor, torch.Tensor] | None, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the running minimum and maximum, float32 [num_kv_heads, head_dim], over the tokens seen so far."""
    low, high = (bound.float() for bound in tensor.aminmax(dim=0))
    return (low, high) if seen is None else (torch.minimum(seen[0], low), torch.maximum(seen[1], high))


def _percentiles(sample: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ranges [num_kv_heads, head_dim] that leave ``share`` of a channel's tokens out on each side."""
    ordered = sample.sort(dim=0).values
    out = int(share * (ordered.shape[0] - 1))
    return ordered[out], ordered[ordered.shape[0] - 1 - out]
