"""How many CPU threads small tensor operations get."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Up to this many elements an operation is over before a second thread has woken up.
SMALL = 4096


@contextlib.contextmanager
def few_threads(elements: int) -> Iterator[None]:
    """Run small CPU operations on one thread.

    A loop of thousands of operations that take microseconds each waits at a barrier after every one when it has
    several threads; on a machine whose cores are shared, each wait can take a time slice. Seen once on two busy cores,
    for GPTQ on a model of 7M weights: 138 s of CPU time with two threads, 39 s with one.

    Args:
        elements: length of the loop's typical vector; many elements keep all threads.

    """
    threads = torch.get_num_threads()
    if elements > SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
