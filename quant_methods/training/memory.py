"""Memory that runs out while a model is trained, answered by what would take less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kv_cache.errors import ParetoError

SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


class Sizes(Protocol):
    """The settings that memory depends on in every training."""

    @property
    def micro_batch(self) -> int:
        """Examples that are in memory at once."""

    @property
    def checkpointing(self) -> bool:
        """Whether blocks run again on the way back."""

    @property
    def length(self) -> int:
        """Tokens of an example."""


@contextlib.contextmanager
def memory_explained(device: str, settings: Sizes, more: Sequence[str] = ()) -> Iterator[None]:
    """Answer memory that runs out by what would take less.

    Args:
        device: torch device.
        settings: of the training.
        more: other flags that lower what it takes, for the end of the line.

    Raises:
        ParetoError: memory ran out.

    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(sign in str(error).lower() for sign in SIGNS):
            raise
        less = []
        if settings.micro_batch > 1:
            less.append(f"--micro-batch {settings.micro_batch // 2} (the same result, slower)")
        if not settings.checkpointing:
            less.append("--checkpointing (the same result, slower)")
        less += [f"--length {max(2, settings.length // 2)}", *more]
        *others, last = less
        listed = f"{', '.join(others)}, or {last}" if others else last
        raise ParetoError(f"out of memory on {device}; give {listed}") from error
