"""The shapes of load: levels over time, intended starts of open loops, and the flags that ask for them."""

from __future__ import annotations

import argparse
from itertools import count, islice

import numpy as np
import pytest

from loadtest import command
from loadtest.errors import LoadTestError
from loadtest.load.stage import Stage
from loadtest.settings import load_settings
from loadtest.shapes.arrivals import ARRIVALS
from loadtest.shapes.ramp import Ramp
from loadtest.shapes.registry import PROFILES, fitted, make_shape
from loadtest.shapes.shape import Hold
from loadtest.shapes.steps import Steps
from loadtest.shapes.trace import Trace
from loadtest.stage_spec import StageSpec


def stages(words: str) -> tuple[StageSpec, ...]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return load_settings(parser.parse_args(words.split())).stages


def test_steps_follow_each_other_and_end() -> None:
    steps = Steps.parse("1:10 4:20.5s")
    assert [steps.users(t) for t in (0, 9.9, 10, 30.4, 30.5)] == [1, 1, 4, 4, 0]
    assert (steps.peak, steps.seconds) == (4, 30.5)


def test_a_ramp_of_users_is_even_and_then_stays() -> None:
    ramp = Ramp.parse("1:5:8s")
    assert [ramp.users(t) for t in (0, 0.9, 1, 2.9, 3, 7, 8, 100)] == [1, 1, 2, 2, 3, 5, 5, 5]
    assert [Ramp.parse("4:1:3").users(t) for t in (0, 1, 2, 3, 9)] == [4, 3, 2, 1, 1]


@pytest.mark.parametrize("profile", ["1:5:8", "5:1:8", "0:3:2"])
def test_a_user_waits_until_the_level_has_room_for_it(profile: str) -> None:
    ramp = Ramp.parse(profile)
    for number in range(6):
        for elapsed in np.linspace(0, 12, 49):
            pause = ramp.wait(number, elapsed)
            later = [t for t in np.linspace(elapsed, 20, 4001) if ramp.users(t) > number]
            if pause is None:
                assert not later
            else:
                assert later
                assert later[0] - elapsed == pytest.approx(pause, abs=0.011)


@pytest.mark.parametrize("profile", ["2/s:20/s:10s", "20/s:2/s:10s", "0/s:22/s:10s"])
def test_a_ramp_of_rates_offers_the_area_below_it(profile: str) -> None:
    """From 2/s to 20/s in 10 s are 110 requests, and after t seconds as many as the integral of the rate."""
    ramp = PROFILES["ramp"].parse(profile)
    starts = np.array([t for t in islice(ramp.starts(map(float, count())), 200) if t < 10])
    assert len(starts) == 110
    low, high = ramp.segments[0].begin, ramp.segments[0].end
    due = low * starts + (high - low) * starts**2 / 20
    assert due == pytest.approx(np.arange(110), abs=1e-6)


def test_random_arrivals_of_steps_keep_each_steps_rate() -> None:
    steps = Steps.parse("10/s:200 40/s:200")
    starts = np.array(list(steps.starts(ARRIVALS["poisson"](np.random.default_rng(1), 1.0))))
    assert starts[-1] < 400
    assert (starts < 200).sum() / 200 == pytest.approx(10, rel=0.06)
    assert (starts >= 200).sum() / 200 == pytest.approx(40, rel=0.06)
    gaps = np.diff(starts[starts >= 200])
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.06)


def test_parts_of_several_processes_are_the_whole_stream() -> None:
    spec = StageSpec(rate=20.0, requests=50, shape="ramp", profile="1/s:20/s:30s")

    def stream(part: tuple[int, int]) -> list[tuple[float, int]]:
        return [(offset, ticket.index) for offset, ticket in Stage(spec, 3).arrivals(False, 0, part)]

    assert len(stream((0, 1))) == 50
    assert sorted(stream((0, 3)) + stream((1, 3)) + stream((2, 3))) == stream((0, 1))


def test_a_trace_starts_on_its_times_and_faster_by_a_factor() -> None:
    times = [0.0, 0.5, 0.5, 4.0]
    spec = fitted(StageSpec(shape="trace", speed=2.0), times)
    assert (spec.mode, spec.rate, spec.requests) == ("open", 2.0, 4)
    stage = Stage(spec, 0, shape=make_shape(spec, times))
    assert [(offset, ticket.index) for offset, ticket in stage.arrivals(False)] == [
        (0.0, 0),
        (0.25, 1),
        (0.25, 2),
        (2.0, 3),
    ]
    assert fitted(StageSpec(shape="trace", requests=2), times).requests == 2


@pytest.mark.parametrize(("times", "why"), [([], "no request"), ([1.0, 0.5], "ascend"), ([-1.0], "ascend")])
def test_bad_times_are_refused(times: list[float], why: str) -> None:
    with pytest.raises(LoadTestError, match=why):
        Trace(times)


def test_a_trace_without_times_is_refused() -> None:
    with pytest.raises(LoadTestError, match="--trace FILE"):
        fitted(StageSpec(shape="trace"), None)


def test_one_level_has_no_end() -> None:
    assert Hold(3).users(1e9) == 3
    assert Hold(3).wait(2, 5.0) == 0
    assert Hold(3).wait(3, 5.0) is None
    assert list(islice(Hold(4.0).starts(map(float, count())), 3)) == [0, 0.25, 0.5]


def test_the_flags_give_one_stage_with_its_length() -> None:
    (ramp,) = stages("--ramp 1:20:1m")
    assert (ramp.mode, ramp.concurrency, ramp.rate, ramp.duration_s) == ("closed", 20, None, 60)
    (steps,) = stages("--steps 2/s:30 8.5/s:10s --arrival constant --warmup 3")
    assert (steps.mode, steps.concurrency, steps.rate, steps.duration_s) == ("open", None, 8.5, 40)
    assert (steps.arrival, steps.warmup, steps.requests) == ("constant", 3, None)
    assert stages("--ramp 1:20:10 --duration 30")[0].duration_s == 30


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--steps 4", "--steps 4: 4: expected LEVEL:TIME"),
        ("--steps 0:5", "--steps 0:5: 0:5: expected a level above 0"),
        ("--steps 4:0", "--steps 4:0: 0: expected a time above 0"),
        ("--steps 4:-1", "expected a time above 0"),
        ("--steps x:5", "x: expected a number of users as 4, or of requests a second as 4/s"),
        ("--steps 2.5:5", "2.5: expected a number of users"),
        ("--steps 4:nan", "expected a time above 0"),
        ("--steps 4:5 4/s:5", "all in users or all in requests a second"),
        ("--steps 4:5 --duration 9", "--duration and --steps exclude each other"),
        ("--ramp 1:20", "expected FROM:TO:TIME"),
        ("--ramp 1:20/s:5", "both in users or both in requests a second"),
        ("--ramp 0:0:5", "above 0"),
        ("--ramp 1:20:60s --rate 5", "exclude each other"),
        ("--ramp 1:20:60s --steps 1:5", "exclude each other"),
        ("--trace-speed 2 --rate 1", "--trace-speed needs --trace"),
        ("--trace-speed 0", "--trace-speed 0: must be above 0"),
        ("--ramp 1:4:5 --max-concurrency 3", "--max-concurrency needs --rate"),
    ],
)
def test_bad_flags_are_refused(words: str, why: str) -> None:
    with pytest.raises(LoadTestError) as caught:
        stages(words)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
