"""vLLM's entry point: called in every process, more than once, and so almost nothing is imported here."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from kv_cache.errors import ParetoError
from kv_cache.formats import DTYPES
from vllm_ext.compat import module_of
from vllm_ext.on_import import on_import
from vllm_ext.versions import check_vllm_version, vllm_version

WARNED = "VLLM_PARETO_WARNED"
"""Set once the warning was printed: a server has many processes, which inherit the environment."""
_MARK = "_pareto_refuses"


def register() -> None:
    """Make the KV-cache dtypes and the checkpoint format known to vLLM; calling it again changes nothing.

    A vLLM that this plugin was not made for stays as it is, and says so once: whoever upgrades vLLM must not lose the
    models that need nothing of ours. Only what asks for a dtype or a checkpoint of ours is refused.
    """
    try:
        check_vllm_version()
    except ParetoError as error:
        _switch_off(error)
        return
    from vllm_ext import patches

    patches.apply(_does_not_fit)


def _does_not_fit(error: Exception) -> None:
    """Switch off at a patch that failed: a supported vLLM, but something in it is not as we know it."""
    _switch_off(
        ParetoError(
            f"vLLM {vllm_version()} is not as expected ({type(error).__name__}: {' '.join(str(error).split())}): "
            "'pareto vllm-contract' lists what differs"
        )
    )


def _switch_off(error: ParetoError) -> None:
    _warn(error)
    on_import(module_of("EngineArgs"), functools.partial(_refuse_dtypes, str(error)))
    on_import(module_of("register_quantization_config"), functools.partial(_refuse_checkpoints, str(error)))


def _warn(error: ParetoError) -> None:
    if os.environ.get(WARNED):
        return
    os.environ[WARNED] = "1"
    print(
        f"pareto: warning: the plugin is off, and its KV-cache dtypes ({', '.join(DTYPES)}) and checkpoints with it; "
        f"all else works: {error}",
        file=sys.stderr,
        flush=True,
    )


def _refuse_dtypes(message: str) -> None:
    """Say why where an engine is asked for a dtype of ours; vLLM would only say that it does not know the name."""
    # What another version has in place of these is not looked for.
    args = getattr(sys.modules[module_of("EngineArgs")], "EngineArgs", None)
    original = getattr(args, "create_engine_config", None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "kv_cache_dtype", None) in DTYPES:
            raise ParetoError(f"--kv-cache-dtype {self.kv_cache_dtype}: {message}")
        return original(self, *args, **kwargs)

    setattr(create_engine_config, _MARK, True)
    args.create_engine_config = create_engine_config  # type: ignore[union-attr]


def _refuse_checkpoints(message: str) -> None:
    """Say why where a checkpoint in the format of ours is loaded."""
    try:
        from quant_methods.formats.native_format import QUANT_METHOD
        from vllm_ext.compat import QUANTIZATION_METHODS, QuantizationConfig, register_quantization_config

        if QUANT_METHOD in QUANTIZATION_METHODS:
            return

        def from_config(cls: type, config: dict[str, Any]) -> Any:
            raise ParetoError(f"the checkpoint is of the format {QUANT_METHOD!r}: {message}")

        refusal = type("UnsupportedParetoConfig", (QuantizationConfig,), {"from_config": classmethod(from_config)})
        register_quantization_config(QUANT_METHOD)(refusal)
    # What an unknown version has instead may fail in any way; it then says itself that it does not know the format.
    except Exception:
        return
