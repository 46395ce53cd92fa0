"""What happens once in the process that starts an engine with one of our dtypes: checks, scales, metrics."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from kv_cache.cuda.arguments import MAX_QUERY_LEN
from kv_cache.errors import ParetoError
from kv_cache.formats import DTYPES, unserved_head_size
from kv_cache.layout import TOKEN_MULTIPLE, PageLayout
from vllm_ext.drafts import DRAFT_MODEL, draft_config, draft_dtype
from vllm_ext.layers import layer_shape, unserved_layers
from vllm_ext.names import DRAFT_SCALES_KEY, SCALES_KEY
from vllm_ext.transfer import check_transfer, separate_storage

if TYPE_CHECKING:
    from kv_cache.scales import KVScales
    from vllm_ext.compat import ModelConfig, VllmConfig

INSTEAD = "use --kv-cache-dtype auto"
"""Said where a dtype does not serve a configuration."""


def prepare(config: VllmConfig) -> None:
    """Refuse what the dtypes cannot serve, find or make scales, and publish metrics; nothing without a dtype of ours.

    Raises:
        ParetoError: one line that says what does not fit and what to use instead.

    """
    dtype = config.cache_config.cache_dtype
    if dtype in DTYPES:
        _check_engine(config, dtype)
        _prepare_model(config, dtype)
    if drafts := draft_dtype(config):
        _check_engine(config, drafts)
        _prepare_draft(config, drafts)
    separate_storage(config)


def _prepare_model(config: VllmConfig, dtype: str) -> None:
    """Find or make the scales of the model that answers, and publish its metrics."""
    from vllm_ext.compat import init_logger
    from vllm_ext.metrics import publish
    from vllm_ext.scale_source import find_scales, model_scales

    model = config.model_config
    if reason := _unserved(model):
        raise ParetoError(f"--kv-cache-dtype {dtype} {reason}: {INSTEAD}")
    config.additional_config[SCALES_KEY] = str(find_scales(config))
    _check_layouts(model_scales(config), dtype)
    cost = publish(config)
    if unserved := unserved_layers(model):
        sizes = sorted({layer_shape(model, layer)[1] for layer in unserved})
        init_logger(__name__).warning(
            "--kv-cache-dtype %s: %d of %d layers have heads of %s channels, which no kernel serves, and keep %s; a "
            "cached token takes %.1f bits an element over all layers",
            dtype, len(unserved), model.get_total_num_hidden_layers(), " or ".join(map(str, sizes)),
            str(model.dtype).removeprefix("torch."), cost.mean_bits,
        )  # fmt: skip


def _check_layouts(scales: KVScales, dtype: str) -> None:
    """Raise unless the bits of each coded layer fit its heads."""
    for layer in range(scales.num_layers):
        if shape := scales.shape(layer):
            PageLayout(scales.format(dtype, layer), shape[1], TOKEN_MULTIPLE)


def _prepare_draft(config: VllmConfig, dtype: str) -> None:
    """Find or make the draft model's scales; where it cannot have any, let what drafts keep 16 bits, and say so."""
    from vllm_ext.scale_source import find_scales, model_scales

    speculative = config.speculative_config
    if speculative.method == "extract_hidden_states":
        what = "the speculative method extract_hidden_states, which keeps hidden states in the KV cache"
        raise ParetoError(f"--kv-cache-dtype {dtype} does not serve {what}: {INSTEAD}")
    try:
        model, _ = draft_config(config)
        if speculative.method != DRAFT_MODEL:
            raise ParetoError(
                f"{speculative.method} drafts from the model's hidden states and has no scales of its own"
            )
        if reason := _unserved(model):
            raise ParetoError(f"{dtype} {reason}")
        config.additional_config[DRAFT_SCALES_KEY] = str(find_scales(config, draft=True))
        _check_layouts(model_scales(config, draft=True), dtype)
    except ParetoError as error:
        if speculative.kv_cache_dtype is not None:
            raise ParetoError(
                f"kv_cache_dtype {dtype} in --speculative-config: {error}; without it what drafts keeps 16 bits"
            ) from error
        speculative.kv_cache_dtype = "auto"
        print(f"pareto: what drafts keeps its keys and values in 16 bits: {error}", file=sys.stderr, flush=True)


def _unserved(model: ModelConfig) -> str | None:
    """Return why no dtype serves a model; None if they do."""
    if model.use_mla:
        return "does not serve multi-head latent attention"
    if model.is_attention_free:
        return "has nothing to serve in a model without attention"
    if len(unserved_layers(model)) < model.get_total_num_hidden_layers():
        return None
    return f"does not serve {unserved_head_size(layer_shape(model, 0)[1])}"


def _check_engine(config: VllmConfig, dtype: str) -> None:
    """Refuse what the backends cannot serve, whatever the model."""
    from vllm_ext.compat import current_platform

    if not current_platform.is_cpu() and not current_platform.is_cuda():
        raise ParetoError(f"--kv-cache-dtype {dtype} is served on CPU and NVIDIA GPUs only: {INSTEAD} here")
    check_transfer(config, dtype)
    if current_platform.is_cuda():
        _check_cuda(config, dtype)
    else:
        from kv_cache.cpu_kernels import best_isa

        best_isa()


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
