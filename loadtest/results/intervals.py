"""The intervals and the steady part of a stage's result."""

from __future__ import annotations

from dataclasses import replace

from loadtest.results.schema import Interval, StageResult, SteadyState
from loadtest.statistics.batches import interval, value
from loadtest.statistics.figures import STANDARD, parse_figure
from loadtest.statistics.samples import Samples
from loadtest.statistics.steady import steady_part


def with_intervals(result: StageResult, samples: Samples) -> StageResult:
    """Return ``result`` with an interval for every figure, and with its steady part where it has one."""
    part = steady_part(samples)
    steady = None
    if part is not None:
        kept = samples.part(part.first, part.last)
        begin = float(samples.start[0])
        steady = SteadyState(float(kept.start[0]) - begin, float(kept.start[-1]) - begin, len(kept), figures(kept))
    return replace(result, intervals=figures(samples), steady=steady)


def figures(samples: Samples) -> dict[str, Interval]:
    """Return every figure that the samples have, by name, rounded to 4 decimals."""
    found = {}
    for name in STANDARD:
        figure = parse_figure(name)
        if figure.applies(samples):
            low, high = interval(samples, figure)
            found[name] = Interval(_rounded(value(samples, figure)), _maybe(low), _maybe(high))
    return found


def _rounded(number: float) -> float:
    return round(number, 4)


def _maybe(number: float | None) -> float | None:
    return None if number is None else _rounded(number)
