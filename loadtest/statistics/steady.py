"""Which part of a stage was steady: without the ramp at its begin and the drain at its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loadtest.statistics.samples import Floats, Samples

_MSER_BATCH = 5
_LEAST = 20


@dataclass(frozen=True)
class Part:
    """Requests ``first`` to ``last`` (exclusive) of a stage, in the order of their intended starts."""

    first: int
    last: int


def mser_5(values: Floats) -> int:
    """Return how many of the first values to leave out as the warm-up.

    MSER-5 (White, Cobb and Spratt 2000, "A comparison of five steady-state truncation heuristics for simulation"): of
    all cuts at a multiple of 5 values within the first half, the one after which the mean has the smallest standard
    error.
    """
    count = len(values) // _MSER_BATCH
    if count < 4:
        return 0
    means = values[: count * _MSER_BATCH].reshape(count, _MSER_BATCH).mean(axis=1)
    left = np.arange(count, 0, -1)
    sums = np.cumsum(means[::-1])[::-1]
    squares = np.cumsum(means[::-1] ** 2)[::-1]
    # Squared standard error of the mean of what is left after each cut.
    errors = np.maximum(squares - sums**2 / left, 0.0) / left**2
    return int(np.argmin(errors[: count // 2 + 1])) * _MSER_BATCH


def steady_part(samples: Samples) -> Part | None:
    """Return the steady part of a stage; None when it is shorter than half of the stage or than 20 requests.

    The begin is found by MSER-5 on end-to-end latency. The drain begins when the last request starts: from then on
    fewer and fewer are in flight. A request is left out when it started later than one P95 of end-to-end latency before
    that, so that nearly all of what is kept ran at full load, and slow requests are not left out for being slow.
    """
    latency = samples.quantities["e2e"]
    if len(latency.values) < _LEAST:
        return None
    ramp = mser_5(latency.values)
    first = int(latency.owner[ramp])
    last_start = float(samples.start[-1]) - float(np.quantile(latency.values, 0.95)) / 1000
    last = int(np.searchsorted(samples.start, last_start, side="right"))
    if last - first < max(_LEAST, len(samples) // 2):
        return None
    return Part(first, last)
