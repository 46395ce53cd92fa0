"""The shapes by name. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loadtest.errors import LoadTestError
from loadtest.shapes.ramp import Ramp
from loadtest.shapes.shape import Shape, hold
from loadtest.shapes.steps import Steps
from loadtest.shapes.trace import Trace
from loadtest.stage_spec import HOLD, TRACE, StageSpec

PROFILES: dict[str, type[Shape]] = {"ramp": Ramp, "steps": Steps}
"""The shapes that a flag of their name describes."""


def make_shape(spec: StageSpec, times: Sequence[float] | None = None) -> Shape:
    """Return the shape of a stage; ``times`` are those of the workload, for a trace.

    Raises:
        LoadTestError: a trace without times.

    """
    if spec.shape == HOLD:
        return hold(spec)
    if spec.shape == TRACE:
        return _trace(spec, times)
    return PROFILES[spec.shape].parse(spec.profile)


def fitted(spec: StageSpec, times: Sequence[float] | None) -> StageSpec:
    """Return ``spec`` with the number of requests and the mean rate of its trace, where it is one.

    Raises:
        LoadTestError: a trace without times.

    """
    if spec.shape != TRACE:
        return spec
    trace = _trace(spec, times)
    return replace(spec, rate=round(trace.mean_rate, 4), requests=min(len(trace), spec.requests or len(trace)))


def _trace(spec: StageSpec, times: Sequence[float] | None) -> Trace:
    if times is None:
        raise LoadTestError("the prompts have no times of their own: a trace (--trace FILE) has")
    return Trace(times, spec.speed)
