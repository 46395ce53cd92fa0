import math

import pytest

from bench.statistics import exp_estimate, mean_estimate, proportion


@pytest.mark.parametrize(
    ("df", "table"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (7, 2.3646), (15, 2.1314), (100, 1.9840)]
)
def test_intervals_agree_with_printed_tables_of_student_t(df, table):
    e = mean_estimate([float(i % 3) for i in range(df + 1)])
    assert (e.high - e.value) / e.standard_error == pytest.approx(table, rel=1e-4)


def test_mean_of_known_values():
    e = mean_estimate([1.0, 2.0, 3.0, 4.0])
    assert e.value == 2.5
    assert e.standard_error == pytest.approx(math.sqrt(5 / 3 / 4))
    assert e.high - e.value == pytest.approx(3.1824 * e.standard_error, rel=2e-3)
    assert e.value - e.low == pytest.approx(e.high - e.value)


def test_one_value_has_no_error():
    e = mean_estimate([3.0])
    assert (e.value, e.standard_error, e.low, e.high, e.n) == (3.0, None, None, None, 1)


def test_perplexity_interval_is_the_mapped_interval():
    log = mean_estimate([2.0, 2.2, 2.1])
    e = exp_estimate(log)
    assert e.value == pytest.approx(math.exp(2.1))
    assert e.low == pytest.approx(math.exp(log.low))
    change = exp_estimate(mean_estimate([0.01, 0.03]), shift=-1.0)
    assert change.value == pytest.approx(math.exp(0.02) - 1)
    assert change.low < change.value < change.high


def test_wilson_interval():
    e = proportion(8, 10)
    assert (e.low, e.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    perfect = proportion(60, 60)
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(0.9398, abs=1e-4)
    assert proportion(0, 5).low == 0.0


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 3), (4, 3)])
def test_impossible_proportions(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        proportion(successes, trials)


def test_the_error_of_clusters_by_hand():
    # Mean 14 / 6 = 7/3. Sums of the deviations of clusters: 1 - 14/3 = -11/3, 5 - 14/3 = 1/3, 8 - 14/3 = 10/3.
    # Squares add up to (121 + 1 + 100) / 9 = 24.667; times 3 / 2 for three clusters; the root of it over 6 values.
    e = mean_estimate([1, 0, 2, 3, 4, 4], ["a", "a", "b", "b", "c", "c"])
    assert e.value == pytest.approx(7 / 3)
    assert e.standard_error == pytest.approx(math.sqrt(222 / 9 * 3 / 2) / 6)
    assert e.n == 3
    assert e.high - e.value == pytest.approx(4.3027 * e.standard_error, rel=1e-4)


def test_clusters_of_one_value_are_none():
    values = [1.0, 2.0, 4.0]
    assert mean_estimate(values, ["a", "b", "c"]) == mean_estimate(values)
    assert mean_estimate(values, ["a", "a", "a"]).standard_error is None
    with pytest.raises(ValueError, match="2 labels of clusters for 3 values"):
        mean_estimate(values, ["a", "b"])
