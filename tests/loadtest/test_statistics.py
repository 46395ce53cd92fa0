"""Figures, intervals, steady parts and tests of changes, on simulated queues whose truth is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from loadtest.errors import LoadTestError
from loadtest.results.records import Record
from loadtest.statistics.batches import interval, value
from loadtest.statistics.changes import Difference
from loadtest.statistics.figures import STANDARD, parse_figure
from loadtest.statistics.steady import mser_5, steady_part
from tests.loadtest.simulated import records, run, samples

P95, MEAN = parse_figure("p95_ttft"), parse_figure("mean_ttft")


def test_figures_are_those_of_their_definition() -> None:
    items = records(np.random.default_rng(0), 100)
    items[7].fail("timeout", "late")
    items.append(Record(0, 100, True, 1000.0, 0.0, 9.0, 9.0, 9.0, [9.0]))
    found = samples(items[::-1], {"ttft": 150.0})
    ttft = [
        item.first_token_s * 1000 for i, item in enumerate(items[:100]) if i != 7 and item.first_token_s is not None
    ]
    assert value(found, P95) == pytest.approx(np.percentile(ttft, 95))
    assert value(found, MEAN) == pytest.approx(np.mean(ttft))
    assert value(found, parse_figure("p99.9_itl")) == pytest.approx(20.0)
    assert value(found, parse_figure("mean_e2el")) == pytest.approx(np.mean(ttft) + 40)
    assert value(found, parse_figure("error_rate")) == pytest.approx(0.01)
    assert value(found, parse_figure("goodput")) == pytest.approx(np.sum(np.array(ttft) <= 150) / 100)
    window = max(item.intended_unix_s + item.end_s for item in items[:100]) - items[0].intended_unix_s
    assert value(found, parse_figure("requests_per_s")) == pytest.approx(99 / window)
    assert value(found, parse_figure("output_tokens_per_s")) == pytest.approx(3 * 99 / window)
    assert len([name for name in STANDARD if parse_figure(name).applies(found)]) == len(STANDARD)


@pytest.mark.parametrize("name", ["p95", "p0_ttft", "p100_ttft", "median_ttft", "p95_lag", "ttft", ""])
def test_other_names_are_no_figures(name: str) -> None:
    with pytest.raises(LoadTestError, match="no figure"):
        parse_figure(name)


@pytest.mark.parametrize("name", ["p50_ttft", "p95_ttft", "mean_ttft"])
def test_intervals_hold_the_truth(name: str) -> None:
    rng, figure = np.random.default_rng(1), parse_figure(name)
    truth = np.mean([value(run(rng, 2000), figure) for _ in range(40)])
    held = 0
    for _ in range(300):
        low, high = interval(run(rng), figure)
        held += (low or 0) <= truth <= (high or np.inf)
    # Binomial with 300 trials: three standard deviations are 3.8%.
    assert held / 300 > 0.95 - 0.045


def test_a_short_run_has_no_bounds_it_cannot_have() -> None:
    rng = np.random.default_rng(2)
    assert interval(run(rng, 12), P95) == (None, None)
    low, high = interval(run(rng, 40), parse_figure("p99_ttft"))
    assert low is not None
    assert high is None
    with pytest.raises(ValueError, match="fewer than 20"):
        Difference([run(rng, 12)], [run(rng, 40)], P95)
    with pytest.raises(ValueError, match="the other is repeated"):
        Difference([run(rng, 40)], [run(rng, 40)] * 2, P95)


@pytest.mark.parametrize("name", ["p50_ttft", "p95_ttft", "mean_ttft"])
def test_equal_servers_are_called_different_one_time_in_twenty(name: str) -> None:
    """5% ± 2 is the bar; 1000 comparisons know the share to ±0.7% (one standard deviation)."""
    rng, figure = np.random.default_rng(3), parse_figure(name)
    runs = [run(rng) for _ in range(2000)]
    alarms = [Difference([a], [b], figure).p_above(0.0) < 0.05 for a, b in zip(runs[::2], runs[1::2], strict=True)]
    assert 0.03 <= np.mean(alarms) <= 0.07
    # A limit leaves fewer of them.
    beyond = [Difference([a], [b], figure).p_above(0.05) < 0.05 for a, b in pairwise(runs[:200])]
    assert np.mean(beyond) < 0.05


def test_a_slower_server_is_found() -> None:
    rng = np.random.default_rng(4)
    for figure, n in ((P95, 600), (MEAN, 400)):
        found = [Difference([run(rng, n)], [run(rng, n, slower=1.1)], figure).p_above(0.0) < 0.05 for _ in range(150)]
        assert np.mean(found) >= 0.9
    # At a limit of just the planted change a test of 5% finds it one time in twenty, above it hardly ever.
    pairs = [(run(rng, load=0.0), run(rng, load=0.0, slower=1.1)) for _ in range(300)]
    at = [Difference([a], [b], P95).p_above(0.1) < 0.05 for a, b in pairs]
    assert np.mean(at) <= 0.09


def test_runs_are_the_unit_where_there_are_several() -> None:
    """Each run is faster or slower as a whole, which no test within a run could know."""
    rng = np.random.default_rng(5)
    alarms, found = [], []
    for _ in range(200):
        a, b, c = ([run(rng, 60, slower=s * rng.normal(1.0, 0.02)) for _ in range(5)] for s in (1.0, 1.0, 1.1))
        alarms.append(Difference(a, b, MEAN).p_above(0.0) < 0.05)
        found.append(Difference(a, c, MEAN).p_above(0.0) < 0.05)
    assert 0.01 <= np.mean(alarms) <= 0.1
    assert np.mean(found) >= 0.9
    change = Difference(a, c, MEAN).change()
    assert change.unit == "runs"
    assert change.low is not None
    assert change.high is not None
    assert change.low < 0.1 < change.high


def test_the_interval_of_a_change_is_what_the_tests_do_not_reject() -> None:
    rng = np.random.default_rng(6)
    difference = Difference([run(rng)], [run(rng, slower=1.2)], P95)
    change = difference.change()
    assert change.low is not None
    assert change.high is not None
    assert change.change == pytest.approx(change.b / change.a - 1)
    assert difference.p_above(change.low) == pytest.approx(0.025, abs=0.01)
    assert difference.p_below(change.high) == pytest.approx(0.025, abs=0.01)


def test_a_failing_server_is_a_change_of_the_error_rate() -> None:
    rng = np.random.default_rng(7)
    good, bad = records(rng), records(rng)
    for item in bad[::10]:
        item.fail("timeout", "late")
    difference = Difference([samples(good)], [samples(bad)], parse_figure("error_rate"))
    assert difference.change().change == pytest.approx(0.1)
    assert difference.p_above(0.0) < 0.01
    assert difference.p_above(0.2) > 0.99


def test_mser_finds_the_ramp() -> None:
    rng = np.random.default_rng(8)
    values = np.concatenate([np.linspace(10, 1, 60), np.ones(340)]) + rng.normal(0, 0.3, 400)
    assert 40 <= mser_5(values) <= 75
    assert mser_5(np.ones(12)) == 0


def test_ramp_and_drain_are_left_out() -> None:
    rng = np.random.default_rng(9)
    items = records(rng, 600, load=0.0)
    for i, item in enumerate(items[:60]):
        longer = (60 - i) * 0.02
        item.first_token_s = (item.first_token_s or 0) + longer
        item.last_token_s, item.end_s = (item.last_token_s or 0) + longer, item.end_s + longer
    found = samples(items)
    part = steady_part(found)
    assert part is not None
    assert 40 <= part.first <= 90
    assert part.last < 600
    kept = found.part(part.first, part.last)
    assert value(kept, P95) < value(found, P95)
    # In the steady part as much ends as begins, 100 a second; the whole stage waits for its drain.
    assert value(kept, parse_figure("requests_per_s")) == pytest.approx(100, rel=0.15)
    assert steady_part(samples(items[:20])) is None
