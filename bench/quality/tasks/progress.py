"""Says how many requests of a task are done: a line every ten seconds, with a terminal or without."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

INTERVAL_S = 10.0


@contextlib.contextmanager
def said(name: str) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many more requests are done."""
    done, begun = 0, time.monotonic()
    last, stream = begun, sys.stderr  # lm-eval's own bars are shown nowhere, whatever they are told.

    def say(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= INTERVAL_S:
            last = now
            print(f"{name}: {done:,} requests, {now - begun:.0f} s", file=stream, flush=True)

    yield say
    print(f"{name}: {done:,} requests in {time.monotonic() - begun:.0f} s", file=stream, flush=True)
