"""Makes the names of our KV-cache dtypes known to vLLM: by its registry where it has one, else in its closed list.

vLLM has a registry since 0.33. People type the names in ``DTYPES``; those in ``LAYER_FORMATS`` only layers of a model
in ``mixed_per_head`` have, so that nothing but the choice of a layer's backend needs to know them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import torch
from pydantic.dataclasses import rebuild_dataclass

from kv_cache.formats import DTYPES, LAYER_FORMATS
from vllm_ext import compat
from vllm_ext.on_import import on_import
from vllm_ext.versions import vllm_release


def known_dtypes() -> tuple[str, ...]:
    """Return every name that vLLM takes for ``--kv-cache-dtype``."""
    return get_args(compat.CacheDType) if vllm_release() == "0.32" else tuple(compat.KV_CACHE_DTYPES)


def add_dtypes() -> None:
    """Make our names known; again changes nothing."""
    if set(DTYPES) <= set(known_dtypes()):
        return
    for name in LAYER_FORMATS:
        compat.STR_DTYPE_TO_TORCH_DTYPE[name] = torch.uint8
    if vllm_release() == "0.32":
        _extend_list()
    else:
        _register()


def _register() -> None:
    """Use the registry of vLLM 0.33 and later."""
    for name in DTYPES:
        compat.register_kv_cache_dtype(name)(_handler(name))
    on_import(compat.module_of("selector_with_function"), _let_selector_know)


def _handler(name: str) -> type:
    """Return what vLLM's registry asks about a dtype."""

    def torch_dtype(self: Any) -> torch.dtype:
        return torch.uint8

    def quant_mode(self: Any) -> Any:
        # Not KVQuantMode.CUSTOM, which is meant for dtypes like ours: in 0.33.0 its value is that of OCTAVE_K3V4, 12,
        # so that Python takes it for another name of that mode, and vLLM's code for Octave's pages would see its own.
        # NONE says that no generic kernel of vLLM's knows the pages. That is true, our backends being chosen by the
        # dtype's name, and it is what 0.32 answers for a name that it does not know.
        return compat.KVQuantMode.NONE

    return type("ParetoDtype", (), {"name": name, "torch_dtype": torch_dtype, "quant_mode": quant_mode})


def _let_selector_know() -> None:
    selector = compat.selector_with_function
    original = selector.is_known_kv_cache_dtype

    @functools.wraps(original)
    def is_known_kv_cache_dtype(name: str) -> bool:
        return name in LAYER_FORMATS or original(name)

    selector.is_known_kv_cache_dtype = is_known_kv_cache_dtype


def _retype(config: Any, name: str, annotation: Any) -> None:
    """Give a field of one of vLLM's configurations another type."""
    config.__annotations__[name] = annotation
    for field in dataclasses.fields(config):
        if field.name == name:
            field.type = annotation
    rebuild_dataclass(config, force=True)


def _extend_list() -> None:
    """Extend the list of vLLM 0.32 wherever a module or a compiled schema has a copy of it."""
    cache, names = compat.cache_module, known_dtypes()
    extended = Literal[(*names, *DTYPES)]  # type: ignore[valid-type]
    cache.CacheDType = compat.speculative_module.CacheDType = extended
    _retype(cache.CacheConfig, "cache_dtype", extended)
    _retype(compat.SpeculativeConfig, "kv_cache_dtype", extended | None)
    for name in DTYPES:
        compat.STR_DTYPE_TO_TORCH_DTYPE[name] = torch.uint8
    # VllmConfig holds the two, whose schemas it has compiled into its own.
    rebuild_dataclass(compat.config_module.VllmConfig, force=True)

    def extend_arguments() -> None:
        compat.arg_utils_module.CacheDType = extended
        compat.EngineArgs.__annotations__["kv_cache_dtype"] = extended

    def extend_selector() -> None:
        compat.selector_with_list.CacheDType = Literal[(*names, *DTYPES, *LAYER_FORMATS)]

    on_import(compat.module_of("arg_utils_module"), extend_arguments)
    on_import(compat.module_of("selector_with_list"), extend_selector)
