"""Paired comparisons against values computed by hand, published ones, and how often they are right in simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bench.schema import Estimate
from bench.statistics import holm, non_inferior, paired
from bench.statistics.bootstrap import smallest_mean
from bench.statistics.counts import mcnemar, score_interval, smallest_difference


def answers(more, fewer, trials):
    """Right and wrong answers of the tested and the baseline model."""
    same = trials - more - fewer
    return [1.0] * more + [0.0] * fewer + [1.0] * same, [0.0] * more + [1.0] * fewer + [1.0] * same


def test_mcnemar_and_the_change_by_hand():
    tested, base = answers(6, 1, 20)
    found = paired(tested, base)
    # 6 gained, 1 lost: two-sided, 2 * (C(7,0) + C(7,1)) / 2^7.
    assert (found.more, found.fewer) == (6, 1)
    assert found.p == pytest.approx(2 * (1 + 7) / 128)
    assert found.change.value == pytest.approx(5 / 20)
    # Squares of 7 differences of 1 less 20 times the mean's square, over 19 and 20.
    assert found.change.standard_error == pytest.approx(math.sqrt((7 - 20 * 0.25**2) / 19 / 20))
    assert paired(base, base).p == 1.0


def test_a_published_table_of_right_and_wrong():
    """Airway hyper-responsiveness before and after (Bentur et al. 2009), as in Fagerland, Lydersen and Laake 2014."""
    found = paired(*answers(1, 7, 21))
    assert found.p == pytest.approx(2 * (1 + 8) / 2**8) == pytest.approx(0.0703, abs=1e-4)
    assert (found.change.low, found.change.high) == (pytest.approx(-0.517, abs=1e-3), pytest.approx(-0.026, abs=1e-3))


@pytest.mark.parametrize(("more", "fewer", "trials"), [(0, 3, 40), (5, 0, 9), (12, 30, 400), (0, 7, 7)])
def test_the_score_interval_solves_its_equation(more, fewer, trials):
    """Its ends are where the likelihood's maximum under that difference lies 1.96 standard errors away."""

    def away(difference):
        # The share of questions lost, by a search for the highest likelihood instead of the root in closed form.
        low, high = max(0.0, -difference), (1 - difference) / 2
        lost = np.linspace(low, high, 400_001)[1:-1]
        with np.errstate(divide="ignore"):
            likelihood = (
                (more * np.log(lost + difference) if more else 0)
                + (fewer * np.log(lost) if fewer else 0)
                + (trials - more - fewer) * np.log(1 - 2 * lost - difference)
            )
        best = lost[np.argmax(likelihood)]
        return (more - fewer - trials * difference) / math.sqrt(trials * (2 * best + difference * (1 - difference)))

    low, high = score_interval(more, fewer, trials)
    if low > -1:
        assert away(low) == pytest.approx(1.96, abs=2e-3)
    if high < 1:
        assert away(high) == pytest.approx(-1.96, abs=2e-3)


def test_no_difference_seen_is_not_no_difference():
    """All 50 answers alike: Tango's interval is z^2 / (n + z^2) = 3.8415 / 53.8415 to both sides, not empty."""
    found = paired([1.0] * 50, [1.0] * 50)
    assert (found.change.low, found.change.high) == (
        pytest.approx(-0.07135, abs=1e-5),
        pytest.approx(0.07135, abs=1e-5),
    )
    assert non_inferior(found.change, 0.01, "more") == "undecided"
    clustered = paired([1.0] * 50, [1.0] * 50, [i // 5 for i in range(50)])
    assert clustered.change.high == pytest.approx(3.8415 / 13.8415, abs=1e-4)  # 10 documents.
    shares = paired([0.3] * 50, [0.3] * 50)
    assert (shares.change.high, shares.smallest) == (found.change.high, None)
    assert paired([-3.0] * 50, [-3.0] * 50).change.high is None  # Unbounded: nothing is known of what hides.


def test_clusters_are_drawn_together_by_hand():
    """Two documents, of changes 0 and 1: resamples have means 0, 1/2, 1 in 1, 2, 1 of 4 cases."""
    found = paired([0.0, 0.0, 1.0, 1.0], [0.0] * 4, ["a", "a", "b", "b"])
    # The distance 1/2, stretched by sqrt(2 / 1) and 12.706 / 1.960, is beyond 1/2; the distance 0 is not.
    assert found.p == pytest.approx(0.5, abs=0.02)
    assert found.change.n == 2
    assert found.change.high - 0.5 == pytest.approx(0.5 * math.sqrt(2) * 12.7062 / 1.95996, rel=0.01)
    alone = paired([0.0, 0.0, 1.0, 1.0], [0.0] * 4, ["a", "b", "c", "d"])
    assert alone == paired([0.0, 0.0, 1.0, 1.0], [0.0] * 4)
    assert alone.p == 0.5  # McNemar, 2 * 1/4.


def test_the_bootstrap_draws_every_resample_alike():
    """Of three questions there are 27 resamples; p is the share of them beyond the change."""
    differences = [0.2, 0.5, 1.4]
    change = sum(differences) / 3
    stretch = math.sqrt(3 / 2) * 4.30265 / 1.95996
    means = [sum(drawn) / 3 for drawn in itertools.product(differences, repeat=3)]
    exact = sum(abs(mean - change) * stretch >= change for mean in means) / 27
    assert paired(differences, [0.0] * 3).p == pytest.approx(exact, abs=0.015)


def test_the_bootstrap_on_published_data():
    """Hours of sleep gained by two drugs (Student 1908): mean 1.58, Student's p 0.0028, interval 0.70 to 2.46."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired(second, first)
    assert found.change.value == pytest.approx(1.58)
    assert found.change.standard_error == pytest.approx(0.3890, abs=1e-4)
    assert (found.change.low, found.change.high) == (pytest.approx(0.70, abs=0.06), pytest.approx(2.46, abs=0.06))
    assert found.p < 0.01
    assert found == paired(second, first)  # The same seed every time.


def test_the_smallest_difference_by_hand():
    # Six answers of six must differ, all to one side: a difference d does so with d^6 = 0.8.
    assert smallest_difference(0, 6) == pytest.approx(0.8 ** (1 / 6), abs=1e-4)
    assert smallest_difference(0, 5) is None  # 2 / 2^5 is above 0.05: no outcome would show anything.
    assert paired(*answers(0, 0, 6)).smallest == pytest.approx(0.8 ** (1 / 6), abs=1e-4)


def test_the_smallest_difference_of_means_as_published():
    """G*Power: for half a standard deviation a paired t-test needs 34 pairs (Faul et al. 2007)."""
    for pairs, enough in ((33, False), (34, True)):
        differences = np.array([1.0, -1.0] * (pairs // 2) + [0.0] * (pairs % 2))
        differences /= differences.std(ddof=1)
        assert (paired(differences, [0.0] * pairs).smallest <= 0.5) == enough


@pytest.mark.parametrize("units", [2, 3, 10, 72, 73, 74, 87, 120, 1319, 100_000])
def test_the_smallest_difference_of_means_by_the_t_distribution(units):
    """Student's t of that difference is beyond the critical one in 80%; statsmodels' own search fails at 73."""
    away = smallest_mean(Estimate(0.0, 1.0, None, None, units))
    critical = stats.t.ppf(0.975, units - 1)
    assert stats.nct.sf(critical, units - 1, away) == pytest.approx(0.8, abs=1e-3)
    assert type(away) is float


@pytest.mark.parametrize(("differing", "trials"), [(0, 60), (12, 100), (80, 400)])
def test_the_smallest_difference_is_shown_in_four_of_five_samples(differing, trials):
    draw, difference = np.random.default_rng(0), smallest_difference(differing, trials)
    differ = max(differing / trials, difference)
    odds = [(differ + difference) / 2, (differ - difference) / 2, 1 - differ]
    shown = sum(mcnemar(int(m), int(f)) < 0.05 for m, f, _ in draw.multinomial(trials, odds, size=2000))
    assert shown / 2000 == pytest.approx(0.8, abs=0.03)


def coverage(samples):
    """Share of samples whose interval holds the true change, 0, and whose p is at most 0.05."""
    held = [(one.change.low <= 0 <= one.change.high, one.p <= 0.05) for one in samples]
    return np.mean(held, axis=0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    draw = np.random.default_rng(1)
    skewed = coverage([paired(draw.exponential(size=40), draw.exponential(size=40)) for _ in range(200)])
    assert skewed[0] > 0.92
    assert skewed[1] < 0.08
    # Right and wrong answers of 25 documents with 6 questions each, whose changes go together.
    documents = np.repeat(np.arange(25), 6)

    def clustered():
        shift = draw.normal(size=25)[documents]
        one, other = (draw.normal(size=150) < sign * shift for sign in (1, -1))
        return one.astype(float), other.astype(float)

    samples = [clustered() for _ in range(200)]
    assert 0.92 < coverage([paired(*one, documents) for one in samples])[0] < 0.98
    # What clustering is for: as if questions were independent, the interval promises too much.
    assert coverage([paired(*one) for one in samples])[0] < 0.85
    # 60 questions of which 3% differ: the interval of a mean of differences holds the truth in 84%.
    rare = [paired(*answers(*draw.multinomial(60, [0.015, 0.015, 0.97])[:2], 60)) for _ in range(500)]
    assert coverage(rare)[0] > 0.94
    assert coverage(rare)[1] < 0.05


def test_holm_by_hand():
    # In order 0.01 * 3, then the larger of that and 0.03 * 2, then 0.04 * 1, which is not below the one before it.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_wrong_about_a_whole_table_in_one_of_twenty():
    tables = np.random.default_rng(2).uniform(size=(100, 10))
    assert sum(min(holm(table)) < 0.05 for table in tables) <= 8
    assert sum(tables.min(1) < 0.05) > 20


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (-0.009, 0.004, "more", "non-inferior"),
        (-0.03, 0.02, "more", "undecided"),
        (-0.03, -0.011, "more", "inferior"),
        (-0.009, -0.001, "more", "non-inferior"),  # Significantly worse, by less than matters.
        (-0.004, 0.009, "less", "non-inferior"),
        (0.011, 0.03, "less", "inferior"),
        (0.0, 0.01, "less", "undecided"),
        (None, None, "more", "undecided"),
    ],
)
def test_verdicts(low, high, better, verdict):
    assert non_inferior(Estimate(0.0, None, low, high, 9), 0.01, better) == verdict


@pytest.mark.parametrize(("margin", "better"), [(0.0, "more"), (-0.01, "more"), (math.nan, "more"), (0.01, "higher")])
def test_verdicts_that_make_no_sense(margin, better):
    with pytest.raises(ValueError, match="is to be above 0, and better"):
        non_inferior(Estimate(0.0, None, None, None, 1), margin, better)


def test_a_single_unit_shows_nothing():
    assert paired([1.0, 0.5], [0.0, 0.0], ["a", "a"]).p == 1.0
    assert stats.binomtest(1, 1).pvalue == paired([1.0], [0.0]).p == 1.0
    assert paired([0.5], [0.2]).change.low is None
    with pytest.raises(ValueError, match="no values"):
        paired([], [])
