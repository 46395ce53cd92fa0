"""Every change that this plugin makes to vLLM's own objects, but for the names of dtypes (``dtype_names.py``).

The places that choose an attention backend and build the engine's configuration are wrapped. Nothing changes for vLLM's
own dtypes. Each change waits until vLLM imports the module in question, so that a process that only answers requests
pays for none of them. Applying the patches twice changes nothing.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from kv_cache.formats import CODED, DTYPES, MIXED, unserved_head_size
from vllm_ext import compat, names
from vllm_ext.dtype_names import add_dtypes
from vllm_ext.on_import import on_import

_MARK = "_pareto_patched"

Failed = Callable[[Exception], None]


def apply(failed: Failed) -> None:
    """Patch the vLLM of this process.

    Args:
        failed: called where a patch does not fit vLLM, then or when vLLM imports what it is for. An exception there
            would keep vLLM from its own work.

    """
    patches = {
        # With all of vllm.config there, not with CacheConfig's module alone, which VllmConfig's imports.
        "VllmConfig": add_dtypes,
        "register_quantization_config": _add_checkpoints,
        "DefaultModelLoader": _expand_sparse_weights,
        "Attention": _give_layers_their_bits,
        "CpuPlatform": _choose_cpu_backend,
        "CudaPlatformBase": _choose_cuda_backend,
        "EngineArgs": _check_at_start,
    }
    if os.environ.get(names.LOW_BIT_KERNEL_VARIABLE, "").lower() not in ("", "0", "false", "no", "off"):
        # To install a package is no choice: the user chooses by the variable.
        patches["linear_kernels_module"] = _offer_kernel
    for name, patch in patches.items():
        on_import(compat.module_of(name), functools.partial(_try, patch, failed))


def _try(patch: Callable[[], None], failed: Failed) -> None:
    try:
        patch()
    except Exception as error:
        failed(error)


def _add_checkpoints() -> None:
    from vllm_ext import sparse_checkpoints, weights_config  # noqa: F401  (importing registers)


def _expand_sparse_weights() -> None:
    """Expand the weights of other people's sparse checkpoints while they are read."""
    loader = compat.DefaultModelLoader
    original = loader.get_all_weights
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: Any) -> Any:
        from vllm_ext.sparse_checkpoints import expand

        return expand(original(self, model_config, model), model_config.hf_config)

    setattr(get_all_weights, _MARK, True)
    loader.get_all_weights = get_all_weights


def _offer_kernel() -> None:
    """Offer the 4-bit kernel for checkpoints of any origin."""
    from vllm_ext.low_bit_kernel import ParetoLowBitLinearKernel

    kernels = compat.linear_kernels_module._POSSIBLE_KERNELS[compat.PlatformEnum.CUDA]
    if ParetoLowBitLinearKernel not in kernels:
        kernels.insert(0, ParetoLowBitLinearKernel)


def _give_layers_their_bits() -> None:
    """Let each attention layer be built with the dtype that is its own.

    Under ``mixed_per_head`` that is the one that its bits name, and vLLM's for a layer whose heads no kernel serves. A
    layer with a dtype of ours must have scales, and not those of another layer.
    """
    layer = compat.Attention
    build, describe = layer.__init__, layer.get_kv_cache_spec
    if hasattr(build, _MARK):
        return

    @functools.wraps(build)
    def __init__(
        self: Any,
        num_heads: int,
        head_size: int,
        *args: Any,
        cache_config: Any = None,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        if cache_config is not None and cache_config.cache_dtype in DTYPES:
            own = cache_config.cache_dtype
            if unserved_head_size(head_size):
                own = "auto"
            elif own == MIXED:
                from vllm_ext.scale_source import layer_dtype

                own = layer_dtype(prefix)
            if own != cache_config.cache_dtype:
                cache_config = copy.copy(cache_config)
                cache_config.cache_dtype = own
        build(self, num_heads, head_size, *args, cache_config=cache_config, prefix=prefix, **kwargs)
        if self.kv_cache_dtype in CODED:
            from vllm_ext.scale_source import check_layer

            check_layer(self)

    @functools.wraps(describe)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = describe(self, vllm_config)
        if spec is not None and self.kv_cache_dtype in CODED:
            from vllm_ext.layers import fitted

            return fitted(spec, self.attn_backend, vllm_config)
        return spec

    setattr(__init__, _MARK, True)
    layer.__init__, layer.get_kv_cache_spec = __init__, get_kv_cache_spec


def _choose_cpu_backend() -> None:
    _choose_backend(compat.CpuPlatform, names.CPU_BACKEND, names.CPU_BACKEND_PATH)


def _choose_cuda_backend() -> None:
    _choose_backend(compat.CudaPlatformBase, names.CUDA_BACKEND, names.CUDA_BACKEND_PATH)


def _choose_backend(platform: Any, name: str, path: str) -> None:
    if name not in compat.AttentionBackendEnum.__members__:
        compat.AttentionBackendEnum.register(name, path)
    original = platform.get_attn_backend_cls.__func__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if attn_selector_config.kv_cache_dtype in CODED:
            module = importlib.import_module(path.rpartition(".")[0])
            chosen: str = module.backend_path(attn_selector_config)
            return chosen
        return original(cls, selected_backend, attn_selector_config, *args, **kwargs)

    setattr(get_attn_backend_cls, _MARK, True)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _check_at_start() -> None:
    args = compat.EngineArgs
    original = args.create_engine_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_ext.known_faults import warn

        config = original(self, *args, **kwargs)
        speculative = config.speculative_config
        if not {config.cache_config.cache_dtype, speculative and speculative.kv_cache_dtype}.isdisjoint(DTYPES):
            from vllm_ext.startup import prepare

            prepare(config)
        warn(config)
        return config

    setattr(create_engine_config, _MARK, True)
    args.create_engine_config = create_engine_config
