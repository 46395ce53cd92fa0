"""The search for the highest rate, and what tells a growing queue, on a queue that is simulated exactly."""

from __future__ import annotations

import heapq
from itertools import islice

import numpy as np
import pytest

from loadtest.load.attainment import Attained, bounds, crossing
from loadtest.load.saturation import SaturationWatch
from loadtest.load.search import RateSearch
from loadtest.load.sweep import RateSweep, make_search
from loadtest.results.records import Record
from loadtest.shapes.arrivals import ARRIVALS
from loadtest.stage_spec import SearchSettings, StageSpec

SLOTS, SECONDS = 8, 20.0


def serve(rate: float, capacity: float, arrival: str = "constant", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and waits of the requests of a stage, at a server of ``SLOTS`` slots, first come first served."""
    draws = ARRIVALS[arrival](np.random.default_rng(seed), 1.0)
    starts = np.array([due / rate for due in islice(draws, int(rate * SECONDS * 2)) if due < SECONDS * rate])
    free = [0.0] * SLOTS
    waits = []
    for start in starts:
        begin = max(start, heapq.heappop(free))
        heapq.heappush(free, begin + SLOTS / capacity)
        waits.append(begin - start)
    return starts, np.array(waits)


def watch(rate: float, capacity: float, arrival: str = "constant", until: float = SECONDS) -> SaturationWatch:
    starts, waits = serve(rate, capacity, arrival)
    service = SLOTS / capacity
    seen = SaturationWatch(rate)
    for moment in np.arange(0, until, 0.1):
        seen.sample(float(moment), int(((starts <= moment) & (starts + waits + service > moment)).sum()))
    for start, wait in zip(starts, waits, strict=True):
        if start + wait + service < until:
            first = float(wait + service)
            seen.observe(Record(0, 0, intended_unix_s=float(start), first_token_s=first, end_s=first), 0.0)
    return seen


@pytest.mark.parametrize("capacity", [12.0, 40.0, 300.0])
def test_a_queue_that_grows_is_told_from_one_that_does_not(capacity: float) -> None:
    assert not watch(0.98 * capacity, capacity).rising()
    assert watch(1.04 * capacity, capacity).rising()
    assert watch(3 * capacity, capacity).rising()


def test_random_arrivals_below_the_limit_do_not_cut_a_stage_short() -> None:
    for until in np.arange(2.0, SECONDS, 0.5):
        assert not watch(0.85 * 40, 40.0, "poisson", float(until)).rising(certain=True)


def test_an_overload_is_certain_long_before_the_end() -> None:
    assert any(watch(60.0, 40.0, until=float(until)).rising(certain=True) for until in np.arange(1.0, 6.0, 0.5))


@pytest.mark.parametrize("error", [0.7, 0.95, 1.0, 1.03, 1.4])
@pytest.mark.parametrize("capacity", [7.3, 40.0, 900.0])
def test_the_knee_is_found_in_8_stages(capacity: float, error: float) -> None:
    """Even if the first stage's throughput is off by ``error``."""
    search = RateSearch(SearchSettings("knee"), StageSpec(duration_s=SECONDS))
    stages = 0
    while (spec := search.next_stage()) is not None:
        stages += 1
        if spec.rate is None:
            search.guess(capacity * error)
        else:
            search.judge(spec.rate, spec.rate <= capacity)
    found = search.result()
    assert found.converged
    assert found.stages == stages <= 8
    assert found.sustained is not None
    assert found.sustained <= capacity <= found.sustained * 1.05


def test_a_limit_far_below_the_throughput_is_found_too() -> None:
    search, limit = RateSearch(SearchSettings("max-rate", tolerance=0.05), StageSpec(duration_s=1.0)), 23.0
    while (spec := search.next_stage()) is not None:
        if spec.rate is None:
            search.guess(40.0)
        else:
            search.judge(spec.rate, spec.rate <= limit)
    found = search.result()
    assert found.sustained is not None
    assert found.sustained <= limit <= found.sustained * 1.05


@pytest.mark.parametrize("allowed", [0.0005, 0.05, 0.3])
def test_the_highest_rate_within_a_limit_is_found_under_random_arrivals(allowed: float) -> None:
    """``max-rate`` on a simulated server of 8 slots and 40 requests/s, where a request may wait ``allowed`` seconds."""
    capacity = 40.0
    # The truth: the rate at which 90% of many requests wait no longer.
    truth = max(
        rate
        for rate in np.arange(20.0, 40.0, 0.25)
        if np.mean([(serve(rate, capacity, "poisson", seed)[1] <= allowed).mean() for seed in range(12)]) >= 0.9
    )
    found = []
    for seed in range(100, 116):
        search = RateSearch(SearchSettings("max-rate"), StageSpec(duration_s=SECONDS))
        while (spec := search.next_stage()) is not None:
            if spec.rate is None:
                search.guess(capacity)
            else:
                waits = serve(spec.rate, capacity, "poisson", seed * 10 + spec.index)[1]
                good = int((waits <= allowed).sum())
                search.judge(spec.rate, good >= 0.9 * len(waits), False, (good, len(waits)))
        assert search.result().stages <= 8
        found.append(search.result().estimate or 0.0)
    # Stages of 20 s differ by luck; the searches are right in the middle, most are near, and none is far off.
    errors = np.abs(np.array(found) / truth - 1)
    assert np.median(found) == pytest.approx(truth, rel=0.05)
    assert np.mean(errors <= 0.06) >= 0.6
    assert errors.max() < 0.15


@pytest.mark.parametrize("capacity", [7.3, 40.0, 900.0])
def test_a_limit_at_the_knee_is_found_at_once(capacity: float) -> None:
    """Without luck in the arrivals the share of good requests falls from all to few between two near rates."""
    search = RateSearch(SearchSettings("max-rate"), StageSpec(duration_s=SECONDS))
    while (spec := search.next_stage()) is not None:
        if spec.rate is None:
            search.guess(capacity * 0.99)
        else:
            good = 500 if spec.rate <= capacity else 150
            search.judge(spec.rate, good == 500, False, (good, 500))
    found = search.result()
    assert found.converged
    assert found.stages <= 4
    assert found.estimate == pytest.approx(capacity, rel=0.05)


def test_stages_that_bound_the_answer_surely_do() -> None:
    stages = [Attained(20.0, 500, 500), Attained(30.0, 440, 500), Attained(40.0, 100, 500)]
    assert bounds(stages, 0.9) == (20.0, 40.0)
    found, error = crossing(stages, 0.9)
    assert 25 < found < 30
    assert 0 < error < 0.2
    assert bounds([Attained(40.0, 500, 500), Attained(20.0, 0, 500)], 0.9) == (0.0, float("inf"))


def test_a_stage_that_a_late_generator_spoilt_is_repeated_and_not_believed() -> None:
    search, rates = RateSearch(SearchSettings("knee"), StageSpec()), []
    search.next_stage()
    search.guess(40.0)
    while (spec := search.next_stage()) is not None:
        assert spec.rate is not None
        rates.append(spec.rate)
        # The server could do 40 a second, but the first stage was the generator's fault.
        search.judge(spec.rate, spec.rate <= 40 and len(rates) > 1, invalid=len(rates) == 1)
    assert rates[:2] == [rates[0]] * 2
    assert search.result().sustained == pytest.approx(40, rel=0.05)
    assert search.result().invalid_stages == 0


def test_a_generator_that_stays_late_is_named_in_the_result() -> None:
    search = RateSearch(SearchSettings("knee"), StageSpec())
    search.next_stage()
    search.guess(40.0)
    while (spec := search.next_stage()) is not None:
        assert spec.rate is not None
        search.judge(spec.rate, sustained=False, invalid=True)
    assert search.result().stages == 8
    assert search.result().invalid_stages > 0


def test_a_server_that_serves_nothing_ends_the_search() -> None:
    search = RateSearch(SearchSettings("knee"), StageSpec())
    assert search.next_stage() is not None
    search.guess(0.0)
    assert search.next_stage() is None
    assert search.result().sustained is None
    assert not search.result().converged


def sweep(one: float, all_at_once: float, sustained: float, stages: int = 8) -> tuple[RateSweep, list[StageSpec]]:
    """Sweep a server that serves so much to one user and to many, and sustains so much."""
    search = make_search(SearchSettings("sweep", stages, users=64), StageSpec(duration_s=5.0, arrival="constant"))
    assert isinstance(search, RateSweep)
    specs = []
    while (spec := search.next_stage()) is not None:
        specs.append(spec)
        if spec.rate is None:
            search.guess(one if spec.concurrency == 1 else all_at_once)
        else:
            search.judge(spec.rate, spec.rate <= sustained)
    return search, specs


def test_a_sweep_goes_from_one_at_a_time_to_all_at_once() -> None:
    search, specs = sweep(2.0, 38.0, 40.0)
    assert [spec.concurrency for spec in specs] == [1, 64, *[None] * 6]
    assert [spec.rate for spec in specs[2:]] == pytest.approx([8, 14, 20, 26, 32, 38])
    assert [spec.index for spec in specs] == list(range(8))
    assert {(spec.duration_s, spec.arrival) for spec in specs} == {(5.0, "constant")}
    assert (search.result().sustained, search.result().refused) == (38.0, None)
    assert search.result().converged


def test_a_sweep_ends_at_the_first_rate_that_is_too_much() -> None:
    search, specs = sweep(2.0, 38.0, 21.0)
    assert specs[-1].rate == pytest.approx(26)
    found = search.result()
    assert (found.goal, found.stages, found.converged) == ("sweep", 6, True)
    assert (found.sustained, found.refused) == (pytest.approx(20), pytest.approx(26))


def test_a_sweep_of_three_stages_has_one_rate() -> None:
    _, specs = sweep(2.0, 38.0, 40.0, stages=3)
    assert [spec.rate for spec in specs] == [None, None, 38.0]


@pytest.mark.parametrize(("one", "all_at_once"), [(0.0, 0.0), (5.0, 5.0), (5.0, 4.0)])
def test_a_sweep_without_rates_between_ends_after_its_closed_loops(one: float, all_at_once: float) -> None:
    search, specs = sweep(one, all_at_once, 100.0)
    assert len(specs) == 2
    assert search.result().sustained is None
    assert not search.result().converged


def test_a_sweep_names_a_late_generator() -> None:
    search = make_search(SearchSettings("sweep", 8), StageSpec())
    for throughput in (1.0, 13.0):
        search.next_stage()
        search.guess(throughput)
    spec = search.next_stage()
    assert spec is not None
    assert spec.rate == 3.0
    search.judge(3.0, sustained=False, invalid=True)
    assert search.next_stage() is None
    assert search.result().invalid_stages == 1
