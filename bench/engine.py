"""Starts vLLM with the settings of an evaluation, and reads the KV cache's capacity from it.

Quality must be measured where the context is read back from the cache. A prompt that is prefilled at once attends over
keys and values that were never quantized, so its likelihoods would not show what a KV-cache dtype does. Here prompts
are prefilled in chunks of at most ``chunk_tokens`` (64): all but the current chunk is read from codes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.schema import KVCache
from kv_cache.errors import ParetoError

TAP = "bench.quality.worker_tap.LogitsTap"
PLAIN_DTYPES = ("auto", "bfloat16", "float16")
"""What ``--kv-cache-dtype`` may be for a cache that is not quantized."""


def plain_dtype(name: str | None) -> str:
    """Return a KV-cache dtype's name with all unquantized ones as ``bf16``."""
    return "bf16" if not name or name in PLAIN_DTYPES or name == "None" else name


def json_flag(name: str, text: str | None) -> dict[str, Any]:
    """Return what a flag that takes JSON says, as an argument of ``vllm.LLM``; nothing for None.

    Raises:
        ParetoError: it is no JSON.

    """
    if text is None:
        return {}
    try:
        return {name: json.loads(text)}
    except json.JSONDecodeError as error:
        flag = name.replace("_", "-")
        raise ParetoError(f"--{flag} is not JSON ({error}); e.g. '{{\"mode\": 0}}'") from error


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one engine, in vLLM's names.

    Attributes:
        model: directory of a checkpoint.
        kv_cache_dtype: name of the KV cache's dtype; ``auto`` is the model's own.
        dtype: dtype of weights and activations that are not quantized.
        max_model_len: longest context in tokens.
        max_num_batched_tokens: most tokens a step computes, and so the longest prefill chunk.
        max_num_seqs: most sequences in a step.
        kv_cache_memory_bytes: memory of the KV cache on each GPU or CPU.
        tensor_parallel_size: GPUs that share the model.
        enforce_eager: no compilation and no CUDA graphs; starts faster.
        seed: vLLM's seed.
        worker_extension: class that vLLM mixes into its workers; must be the tap or derive from it.
        extra: further arguments of ``vllm.LLM``; ``enable_prefix_caching`` is off unless it is among them.

    """

    model: str
    kv_cache_dtype: str = "auto"
    dtype: str = "auto"
    max_model_len: int = 8192
    max_num_batched_tokens: int = 64
    max_num_seqs: int = 4
    kv_cache_memory_bytes: int = 1 << 30
    tensor_parallel_size: int = 1
    enforce_eager: bool = True
    seed: int = 0
    worker_extension: str = TAP
    extra: dict[str, Any] = field(default_factory=dict)


def quiet() -> None:
    """Keep vLLM's log and progress bars to errors, unless the user's environment says otherwise."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Deprecations inside other packages, repeated by every worker, say nothing to the user.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def build_llm(settings: EngineSettings) -> Any:
    """Start an engine: chunked prefill, no prefix caching, and the logits tap in its workers.

    Returns:
        A ``vllm.LLM``. Stop it with :func:`stop_llm`; only one should live at a time.

    Raises:
        ParetoError: vLLM refuses the settings or does not come up.

    """
    quiet()
    from vllm import LLM

    # On CPU this variable would override the engine argument, and configurations would differ in memory.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    try:
        return LLM(
            model=settings.model,
            kv_cache_dtype=settings.kv_cache_dtype,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
            kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
            # Memory is given: this would only keep vLLM from starting beside other processes on the device.
            gpu_memory_utilization=0.05,
            tensor_parallel_size=settings.tensor_parallel_size,
            enforce_eager=settings.enforce_eager,
            seed=settings.seed,
            enable_chunked_prefill=True,
            worker_extension_cls=settings.worker_extension,
            use_tqdm_on_load=False,
            disable_log_stats=True,
            **{"enable_prefix_caching": False} | settings.extra,
        )
    except KeyboardInterrupt:
        raise
    except Exception as error:
        raise ParetoError(
            f"vLLM did not start {Path(settings.model).name} with --kv-cache-dtype {settings.kv_cache_dtype}: "
            f"{reason(error)}"
        ) from error


def on_gpu(llm: Any) -> bool:
    """Return whether an engine runs on a GPU, where a prompt is prefilled in full precision."""
    return str(llm.llm_engine.vllm_config.device_config.device_type) != "cpu"


def stop_llm(llm: Any) -> None:
    """Stop an engine and its processes."""
    llm.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def running(settings: EngineSettings) -> Iterator[Any]:
    """Give a running engine, and stop it in the end."""
    llm = build_llm(settings)
    try:
        yield llm
    finally:
        stop_llm(llm)


def reason(error: BaseException) -> str:
    """Return an engine's error in one line.

    Validation errors name the field and list what is valid; a worker that failed wrote its own cause to the log above.
    An error of a kind that no engine raises is named by its type, since its text alone (a key, say) tells nothing.
    """
    if isinstance(error, ParetoError):
        return " ".join(str(error).split())
    errors = getattr(error, "errors", None)
    if callable(errors):
        with contextlib.suppress(Exception):
            parts = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["loc"] else e["msg"] for e in errors()]
            return " ".join("; ".join(parts).split())[:600]
    text = " ".join(str(error).split())
    if not text or not (isinstance(error, (ValueError, RuntimeError)) or type(error) is Exception):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text[:400]


def kv_cache(llm: Any, settings: EngineSettings) -> KVCache:
    """Return the KV cache's memory and capacity as vLLM itself reports them."""
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    tokens = cache.kv_cache_size_tokens
    if tokens is None:
        tokens = cache.num_gpu_blocks * cache.block_size
    memory = sum(llm.collective_rpc("pareto_kv_bytes"))
    return cache_of(
        dtype=settings.kv_cache_dtype,
        memory_bytes=int(memory),
        tokens=int(tokens),
        budget_bytes=settings.kv_cache_memory_bytes * settings.tensor_parallel_size,
        costs=llm.collective_rpc("pareto_token_cost"),
        block_size=int(cache.block_size),
    )


def cache_of(
    *,
    dtype: str,
    memory_bytes: int,
    tokens: int,
    budget_bytes: int,
    costs: Iterable[Sequence[float | None]],
    block_size: int,
) -> KVCache:
    """Return a KV cache from its size and what one token takes in each rank's pages: bytes, and elements or None."""
    pairs = [tuple(cost) for cost in costs]
    per_token = sum(cost for cost, _ in pairs if cost is not None)
    counts = [elements for _, elements in pairs if elements is not None]
    elements = sum(counts) if len(counts) == len(pairs) else None
    bits = 8 * per_token / elements if elements else None
    return KVCache(dtype, memory_bytes, tokens, budget_bytes, per_token, bits, block_size)
