"""Times work on a CUDA device by its own events."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds that the device takes over ``work``."""
    work()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return median(times)


def graph_seconds(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Return the median seconds of one of ``calls``, all captured in one CUDA graph."""
    for call in calls:  # What a first call allocates or compiles is not to be captured.
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_seconds(graph.replay, repeats) / len(calls)


def copy_rate() -> float:
    """Return the bytes read plus written per second by a device-to-device copy."""
    # An engine may have left little memory; 256 MiB are still several times the L2 cache.
    size = max(min(2 << 30, torch.cuda.mem_get_info()[0] // 4), 256 << 20)
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Not in a graph: a graph's copy node runs a fifth slower than the same copy on a stream.
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), 10)
