"""Gauges on vLLM's own /metrics page that say what the KV cache is made of.

vLLM serves the process's default Prometheus registry (or, with several API servers, the multi-process files that all
of them write), so gauges registered in the process that starts the server appear there without a hook.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Gauge

from kv_cache.formats import KVFormat
from vllm_ext.scale_source import layer_format_of

if TYPE_CHECKING:
    from vllm_ext.compat import VllmConfig

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


def cache_cost(formats: list[KVFormat | None], kv_heads: int, head_dim: int, element_bytes: int) -> CacheCost:
    """Return the cost of a model's cache.

    Args:
        formats: of each layer with a KV cache; None for one that keeps ``element_bytes`` per element.
        kv_heads: of a layer.
        head_dim: channels of a head.
        element_bytes: bytes of an unquantized element.

    """
    plain = 2 * head_dim * element_bytes
    quantized = [fmt.bytes_per_token(head_dim) for fmt in formats if fmt is not None]
    total = sum(quantized) + (len(formats) - len(quantized)) * plain
    bits = 8 * sum(quantized) / (2 * head_dim * max(1, len(quantized)))
    return CacheCost(bits, total * kv_heads, len(formats) * plain / total)


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
    skipped = cache.kv_cache_dtype_skip_layers
    formats = [
        None if str(layer) in skipped else layer_format_of(config, layer)
        for layer in range(model.get_total_num_hidden_layers())
    ]
    cost = cache_cost(formats, model.get_total_num_kv_heads(), model.get_head_size(), model.dtype.itemsize)
    labels = (model.served_model_name or model.model, cache.cache_dtype)
    for name, gauge in _gauges().items():
        gauge.labels(*map(str, labels)).set(1 if name == "info" else getattr(cost, name))
    return cost
