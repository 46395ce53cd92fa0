"""Flags that every training has; without PyTorch, since threads are told how to wait before it is imported."""

from __future__ import annotations

import argparse


def add_shared_flags(group: argparse._ArgumentGroup) -> None:
    """Declare the flags that every training has."""
    group.add_argument("--checkpointing", action="store_true", help="less memory: blocks run again on the way back")
    group.add_argument(
        "--float32",
        dest="bfloat16",
        action="store_false",
        help="multiply in float32 also where the device is quick at bfloat16 (GPUs, CPUs with AMX or AVX512-BF16)",
    )


def names_in(text: str) -> tuple[str, ...]:
    """Return the names that a flag lists with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
