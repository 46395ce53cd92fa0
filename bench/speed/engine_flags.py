"""Flags of the engines that are measured, the same for every command that measures speed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine import json_flag
from quant_methods.model_source import resolve_model, resolve_shape


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Declare vLLM's settings that hold for every dtype of a comparison, and the seed of the prompts."""
    parser.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N", help="prefill chunk (default: 8192 on a GPU, else 2048)"
    )
    parser.add_argument("--dtype", default="auto", help="vLLM's --dtype (default: %(default)s)")
    parser.add_argument("--kv-cache-memory-bytes", type=int, metavar="N", help="KV memory, the same for every dtype")
    parser.add_argument(
        "--enforce-eager", action=argparse.BooleanOptionalAction, help="no compilation or CUDA graphs (default: on CPU)"
    )
    parser.add_argument(
        "--load-format", default="auto", metavar="NAME",
        help="vLLM's; dummy measures a model's shape, a folder with a config.json, without weights",
    )  # fmt: skip
    parser.add_argument("--compilation-config", metavar="JSON", help="vLLM's (default: vLLM's own choice)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: %(default)s)")


@dataclass(frozen=True, kw_only=True)
class EngineChoices:
    """vLLM's settings that hold for every dtype of a comparison, and the seed of the prompts, as recorded in a result.

    Attributes:
        max_num_batched_tokens: longest prefill chunk.
        dtype: vLLM's ``--dtype``.
        kv_cache_memory_bytes: the same for every dtype.
        enforce_eager: vLLM's.
        tensor_parallel_size: vLLM's.
        seed: of the random prompts.
        load_format: vLLM's ``--load-format``; ``dummy`` measures a shape without weights.
        compilation_config: vLLM's, as JSON text; None means vLLM's own choice.

    """

    max_num_batched_tokens: int
    dtype: str
    kv_cache_memory_bytes: int
    enforce_eager: bool
    tensor_parallel_size: int
    seed: int
    load_format: str = "auto"
    compilation_config: str | None = None


def chunk_of(args: argparse.Namespace, gpu: bool) -> int:
    """Return the longest prefill chunk that flags ask for, on a GPU or not."""
    return int(args.max_num_batched_tokens or (8192 if gpu else 2048))


def folder_of(args: argparse.Namespace) -> Path:
    """Check --compilation-config, and return the folder of the model that flags name, or of its shape.

    Raises:
        ParetoError: the one is no JSON, or the other not to be found.

    """
    json_flag("compilation_config", args.compilation_config)
    return resolve_shape(args.model) if args.load_format == "dummy" else resolve_model(args.model, quantized=True)


def engine_choices(args: argparse.Namespace, gpu: bool, memory: int) -> dict[str, Any]:
    """Return the fields of :class:`EngineChoices` from flags.

    Args:
        args: with the flags of :func:`add_engine_flags`.
        gpu: whether there is one.
        memory: of the KV cache.

    """
    return {
        "max_num_batched_tokens": chunk_of(args, gpu),
        "dtype": args.dtype,
        "kv_cache_memory_bytes": memory,
        "enforce_eager": not gpu if args.enforce_eager is None else args.enforce_eager,
        "tensor_parallel_size": args.tensor_parallel_size,
        "seed": args.seed,
        "load_format": args.load_format,
        "compilation_config": args.compilation_config,
    }
