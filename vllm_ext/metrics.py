"""Gauges on vLLM's own /metrics page that say what the KV cache is made of.

vLLM serves the process's default Prometheus registry (or, with several API servers, the multi-process files that all
of them write), so gauges registered in the process that starts the server appear there without a hook.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Gauge

from kv_cache.decoder_layers import keeps_keys
from kv_cache.formats import KVFormat
from vllm_ext.layers import layer_shape, unserved_layers
from vllm_ext.scale_source import layer_format_of, model_scales

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
        mean_bits: bits of an element over all layers, unquantized ones included.

    """

    bits_per_element: float
    bytes_per_token: int
    compression_ratio: float
    mean_bits: float


def cache_cost(layers: list[tuple[KVFormat | None, int, int]], element_bytes: int) -> CacheCost:
    """Return the cost of a model's cache.

    Args:
        layers: of each layer with a KV cache of its own: its format, None for ``element_bytes`` per element; its KV
            heads; channels of a head.
        element_bytes: bytes of an unquantized element.

    """
    elements = [2 * heads * dim for _, heads, dim in layers]
    sizes = [heads * (fmt.bytes_per_token(dim) if fmt else 2 * dim * element_bytes) for fmt, heads, dim in layers]
    coded = [number for number, (fmt, _, _) in enumerate(layers) if fmt is not None]
    bits = 8 * sum(sizes[number] for number in coded) / max(1, sum(elements[number] for number in coded))
    whole, total = sum(elements), sum(sizes)
    return CacheCost(bits, total, element_bytes * whole / total, 8 * total / whole)


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
    skipped, scales = cache.kv_cache_dtype_skip_layers, model_scales(config)
    uncoded = {*map(str, unserved_layers(config.model_config)), *skipped}
    layers = [
        (None if str(layer) in uncoded else layer_format_of(config, layer), *layer_shape(config.model_config, layer))
        for layer in range(scales.num_layers)
        # What has no scales has no attention or another layer's cache, but for what no kernel serves.
        if scales.shape(layer) or (str(layer) in uncoded and keeps_keys(model.hf_text_config, layer))
    ]
    cost = cache_cost(layers, model.dtype.itemsize)
    labels = (model.served_model_name or model.model, cache.cache_dtype)
    for name, gauge in _gauges().items():
        gauge.labels(*map(str, labels)).set(1 if name == "info" else getattr(cost, name))
    return cost
