"""Flags of the engines that are measured, the same for every command that measures speed."""

from __future__ import annotations

import argparse


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
