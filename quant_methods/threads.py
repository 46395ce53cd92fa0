"""How CPU threads wait for each other, and how many of them small tensor operations get."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Up to this many elements an operation is over before a second thread has woken up.
SMALL = 4096


def wait_asleep(turns: int = 0) -> None:
    """Let threads that have nothing to do sleep, unless the environment says how they wait.

    OpenMP reads that once, when PyTorch is imported, which has to be later. Threads that wait without sleeping take the
    cores from those that work, where something else runs beside. On two cores with five other processes KV calibration
    took 234 s, and 82 s so. A block of AWQ on SmolLM2 took 47 CPU seconds beside eight processes, 22 with 10,000 turns
    and 10 with none. Beside one process it took 4.8 s with 10,000 turns and 7.8 s with none.

    Args:
        turns: how often a thread looks for work before it sleeps (GNU's OpenMP).

    """
    if turns and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(turns))
    else:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextlib.contextmanager
def few_threads(elements: int) -> Iterator[None]:
    """Run small CPU operations on one thread.

    A loop of thousands of operations that take microseconds each waits at a barrier after every one when it has
    several threads; on a machine whose cores are shared, each wait can take a time slice. Seen once on two busy cores,
    for GPTQ on a model of 7M weights: 138 s of CPU time with two threads, 39 s with one.

    Args:
        elements: length of the loop's typical vector; many elements keep all threads.

    """
    import torch

    threads = torch.get_num_threads()
    if elements > SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
