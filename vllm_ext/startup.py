"""What happens once in the process that starts an engine with one of our dtypes: checks, scales, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kv_cache.cuda.arguments import MAX_QUERY_LEN
from kv_cache.errors import ParetoError
from kv_cache.formats import unserved_head_size
from kv_cache.layout import TOKEN_MULTIPLE, PageLayout
from vllm_ext.layers import layer_shape, unserved_layers
from vllm_ext.names import SCALES_KEY

if TYPE_CHECKING:
    from vllm_ext.compat import VllmConfig


def prepare(config: VllmConfig) -> None:
    """Refuse what the dtype cannot serve, find or make its scales, and publish its metrics.

    Raises:
        ParetoError: one line that says what does not fit and what to use instead.

    """
    from vllm_ext.compat import current_platform, init_logger

    dtype = config.cache_config.cache_dtype
    model = config.model_config
    instead = "use --kv-cache-dtype auto"
    if not current_platform.is_cpu() and not current_platform.is_cuda():
        raise ParetoError(f"--kv-cache-dtype {dtype} is served on CPU and NVIDIA GPUs only: {instead} here")
    if model.use_mla:
        raise ParetoError(f"--kv-cache-dtype {dtype} does not serve multi-head latent attention: {instead}")
    if model.is_attention_free:
        raise ParetoError(f"--kv-cache-dtype {dtype} has nothing to serve in a model without attention: {instead}")
    layers, unserved = model.get_total_num_hidden_layers(), unserved_layers(config)
    if len(unserved) == layers:
        reason = unserved_head_size(layer_shape(config, 0)[1])
        raise ParetoError(f"--kv-cache-dtype {dtype} does not serve {reason}: {instead}")
    if config.kv_transfer_config is not None:
        raise ParetoError(f"--kv-cache-dtype {dtype} does not serve KV transfer between instances: {instead}")
    if current_platform.is_cuda():
        _check_cuda(config, dtype)
    else:
        from kv_cache.cpu_kernels import best_isa

        best_isa()
    from vllm_ext.metrics import publish
    from vllm_ext.scale_source import find_scales, layer_format_of, model_scales

    config.additional_config[SCALES_KEY] = str(find_scales(config))
    scales = model_scales(config)
    for layer in range(layers):
        if shape := scales.shape(layer):
            PageLayout(layer_format_of(config, layer), shape[1], TOKEN_MULTIPLE)
    cost = publish(config)
    if unserved:
        sizes = sorted({layer_shape(config, layer)[1] for layer in unserved})
        init_logger(__name__).warning(
            "--kv-cache-dtype %s: %d of %d layers have heads of %s channels, which no kernel serves, and keep %s; a "
            "cached token takes %.1f bits an element over all layers",
            dtype, len(unserved), layers, " or ".join(map(str, sizes)), str(model.dtype).removeprefix("torch."),
            cost.mean_bits,
        )  # fmt: skip


def _check_cuda(config: VllmConfig, dtype: str) -> None:
    """Refuse what the CUDA backend cannot serve."""
    from vllm_ext.compat import current_platform

    if not current_platform.has_device_capability(80):
        raise ParetoError(f"--kv-cache-dtype {dtype} needs compute capability 8.0 or above: use --kv-cache-dtype auto")
    if not config.use_v2_model_runner:
        raise ParetoError(
            f"--kv-cache-dtype {dtype} needs vLLM's model runner V2 on CUDA, which this configuration does not use: "
            "set VLLM_USE_V2_MODEL_RUNNER=1, or use --kv-cache-dtype auto"
        )
    speculative = config.speculative_config
    if speculative and speculative.num_speculative_tokens >= MAX_QUERY_LEN:
        raise ParetoError(
            f"--kv-cache-dtype {dtype} serves up to {MAX_QUERY_LEN - 1} speculative tokens on CUDA, not "
            f"{speculative.num_speculative_tokens}"
        )
    if config.model_config.dtype not in (torch.bfloat16, torch.float16):
        raise ParetoError(f"--kv-cache-dtype {dtype} serves 16-bit models on CUDA: use --dtype bfloat16 or float16")
