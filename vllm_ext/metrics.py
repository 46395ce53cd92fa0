"""Gauges on vLLM's own /metrics page that say what the KV cache is made of.

vLLM serves the process's default Prometheus registry (or, with several API servers, the multi-process files that all
of them write), so gauges registered in the process that starts the server appear there without a hook.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Gauge

from kv_cache.formats import KVFormat, get_format

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LABELS = ("model_name", "kv_cache_dtype")


@dataclass(frozen=True)
class CacheCost:
    """What one token costs in the KV cache of a whole model.

    Attributes:
        bits_per_element: of the quantized layers, scales kept in the page included.
        bytes_per_token: over all layers and KV heads.
        compression_ratio: bytes per token of the unquantized cache over ``bytes_per_token``.

    """

    bits_per_element: float
    bytes_per_token: int
    compression_ratio: float


def cache_cost(fmt: KVFormat, layers: int, skipped: int, kv_heads: int, head_dim: int, element_bytes: int) -> CacheCost:
    """Return the cost of a model's cache.

    Args:
        fmt: of the quantized layers.
        layers: with a KV cache.
        skipped: of these, how many keep ``element_bytes`` per element.
        kv_heads: of a layer.
        head_dim: channels of a head.
        element_bytes: bytes of an unquantized element.

    """
    plain = 2 * head_dim * element_bytes * kv_heads
    total = (layers - skipped) * fmt.bytes_per_token(head_dim) * kv_heads + skipped * plain
    return CacheCost(fmt.bits_per_element(head_dim), total, layers * plain / total)


@functools.cache
def _gauges() -> dict[str, Gauge]:
    texts = {
        "bits_per_element": "Bits of one element of a quantized KV-cache layer, scales in the page included",
        "bytes_per_token": "Bytes of one token in the KV cache, over all layers and heads",
        "compression_ratio": "Bytes of an unquantized KV cache over the bytes of this one",
        "info": "1 for the KV-cache dtype that the engine was started with",
    }
    return {
        name: Gauge(f"pareto_kv_cache_{name}", text, LABELS, multiprocess_mode="mostrecent")
        for name, text in texts.items()
    }


def publish(config: VllmConfig) -> CacheCost:
    """Set the gauges for an engine's configuration; returns what they say."""
    model, cache = config.model_config, config.cache_config
    layers = model.get_total_num_hidden_layers()
    skipped = sum(layer.isdigit() and int(layer) < layers for layer in cache.kv_cache_dtype_skip_layers)
    cost = cache_cost(
        get_format(cache.cache_dtype),
        layers,
        skipped,
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        model.dtype.itemsize,
    )
    labels = (model.served_model_name or model.model, cache.cache_dtype)
    for name, gauge in _gauges().items():
        gauge.labels(*map(str, labels)).set(1 if name == "info" else getattr(cost, name))
    return cost
