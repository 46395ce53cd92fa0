"""Every change that this plugin makes to vLLM's own objects, and no other code.

vLLM has no registry of KV-cache dtypes yet, so the names are added where vLLM keeps its closed list, and the places
that choose an attention backend and build the engine's configuration are wrapped. Nothing changes for vLLM's own
dtypes. Applying the patches twice changes nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import os
from typing import Any, Literal, get_args

import torch
from pydantic.dataclasses import rebuild_dataclass

from kv_cache.formats import DTYPES, FORMATS, LAYER_FORMATS, MIXED

_MARK = "_pareto_patched"


def apply() -> None:
    """Apply all patches to the vLLM of this process."""
    _add_dtypes()
    _give_layers_their_bits()
    _choose_backend()
    _check_at_start()
    _offer_kernel()


def _offer_kernel() -> None:
    """Offer the 4-bit kernel for checkpoints of any origin, if the user chose so: to install a package is no choice."""
    from vllm_ext.names import LOW_BIT_KERNEL_VARIABLE

    if os.environ.get(LOW_BIT_KERNEL_VARIABLE, "").lower() in ("", "0", "false", "no", "off"):
        return
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from vllm_ext.low_bit_kernel import ParetoLowBitLinearKernel

    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CUDA]
    if ParetoLowBitLinearKernel not in kernels:
        kernels.insert(0, ParetoLowBitLinearKernel)


def _add_dtypes() -> None:
    import vllm.config
    from vllm.config import cache
    from vllm.engine import arg_utils
    from vllm.utils import torch_utils
    from vllm.v1.attention import selector

    names = get_args(cache.CacheDType)
    if set(DTYPES) <= set(names):
        return
    extended = Literal[(*names, *DTYPES)]  # type: ignore[valid-type]
    for module in (cache, arg_utils):
        module.CacheDType = extended
    # What chooses a layer's backend also knows the names that layers of mixed_per_head have; people do not type them.
    selector.CacheDType = Literal[(*names, *DTYPES, *LAYER_FORMATS)]
    cache.CacheConfig.__annotations__["cache_dtype"] = extended
    for field in dataclasses.fields(cache.CacheConfig):
        if field.name == "cache_dtype":
            field.type = extended
    arg_utils.EngineArgs.__annotations__["kv_cache_dtype"] = extended
    for name in (*DTYPES, *LAYER_FORMATS):
        torch_utils.STR_DTYPE_TO_TORCH_DTYPE[name] = torch.uint8
    # VllmConfig holds a CacheConfig, whose schema it has compiled into its own.
    for config in (cache.CacheConfig, vllm.config.VllmConfig):
        rebuild_dataclass(config, force=True)


def _give_layers_their_bits() -> None:
    """Let each attention layer of a model served in ``mixed_per_head`` be built with the dtype that its bits name."""
    from vllm.model_executor.layers.attention.attention import Attention

    original = Attention.__init__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, cache_config: Any = None, prefix: str = "", **kwargs: Any) -> None:
        if cache_config is not None and cache_config.cache_dtype == MIXED:
            from vllm_ext.scale_source import layer_dtype

            cache_config = copy.copy(cache_config)
            cache_config.cache_dtype = layer_dtype(prefix)
        original(self, *args, cache_config=cache_config, prefix=prefix, **kwargs)

    setattr(__init__, _MARK, True)
    Attention.__init__ = __init__


def _choose_backend() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_ext import names

    if current_platform.is_cuda():
        from vllm.platforms.cuda import CudaPlatformBase as Platform

        registered, module = (names.CUDA_BACKEND, names.CUDA_BACKEND_PATH), "vllm_ext.cuda_backend"
    else:
        from vllm.platforms.cpu import CpuPlatform as Platform

        registered, module = (names.CPU_BACKEND, names.CPU_BACKEND_PATH), "vllm_ext.cpu_backend"
    if registered[0] not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(*registered)
    original = Platform.get_attn_backend_cls.__func__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if attn_selector_config.kv_cache_dtype in (*FORMATS, *LAYER_FORMATS, MIXED):
            path: str = importlib.import_module(module).backend_path(attn_selector_config)
            return path
        return original(cls, selected_backend, attn_selector_config, *args, **kwargs)

    setattr(get_attn_backend_cls, _MARK, True)
    Platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _check_at_start() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if config.cache_config.cache_dtype in DTYPES:
            from vllm_ext.startup import prepare

            prepare(config)
        return config

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config
