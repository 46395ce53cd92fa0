import math

import numpy as np
import pytest

from bench.statistics import between_and_within


def test_two_sources_of_variance_by_hand():
    """Runs 0, 1, 2 better and the second question 2 better, without noise."""
    found = between_and_within([[0, 2], [1, 3], [2, 4]])
    assert found.mean.value == 2
    assert found.between == pytest.approx(1)  # Of the means 1, 2, 3.
    assert found.within == pytest.approx(1)  # Each run: the variance 2 over 2 questions.
    # Three seeds, but always the same two questions: 1 / 3 + 1, of 2 and 1 degrees of freedom.
    assert found.mean.standard_error == pytest.approx(math.sqrt(4 / 3))
    degrees = (4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + 1)
    assert degrees == pytest.approx(1.684, abs=1e-3)
    # Student's t of 1.684 degrees at 97.5%, between 12.71 of 1 and 4.30 of 2.
    assert (found.mean.high - 2) / found.mean.standard_error == pytest.approx(5.2, abs=0.2)


def test_published_ratings():
    """Shrout and Fleiss 1979, table 2: four judges, six targets; mean squares 32.49, 11.24 and 1.02."""
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
    found = between_and_within(ratings.T)
    assert found.between == pytest.approx((32.49 - 1.02) / 6, abs=0.01)
    assert found.mean.standard_error**2 == pytest.approx((32.49 + 11.24 - 1.02) / 24, abs=0.01)


def test_runs_that_differ_no_more_than_noise():
    found = between_and_within([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]])
    assert found.between == 0
    assert found.mean.standard_error > 0


def test_an_interval_needs_three_runs():
    one, two = between_and_within([[1.0, 2.0]]), between_and_within([[1.0, 2.0], [2.0, 4.0]])
    assert (one.between, one.mean.low, one.within) == (None, None, pytest.approx(0.25))
    assert two.mean.low is two.mean.standard_error is None
    assert two.between is not None
    for empty in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="each run needs a score"):
            between_and_within(empty)


def test_runs_of_other_questions_hold_both_in_their_means():
    found = between_and_within([[1.0, 3.0], [2.0, 4.0, 6.0], [5.0, 7.0]])
    # Means 2, 4, 6 of variance 4; within a run 2/2, 4/3, 2/2, on average 10/9.
    assert found.within == pytest.approx(10 / 9)
    assert found.between == pytest.approx(4 - 10 / 9)
    assert found.mean.standard_error == pytest.approx(math.sqrt(4 / 3))
    single = between_and_within([[1.0], [2.0], [3.0]])
    assert (single.within, single.between) == (None, 1.0)
    assert between_and_within([[1.0], [1.0], [1.0]]).mean.high == 1.0


@pytest.mark.parametrize(("seeds", "noise"), [(0.0, 1.0), (0.3, 1.0), (1.0, 0.1)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, noise):
    draw, held, naive = np.random.default_rng(3), 0, 0
    for _ in range(1000):
        runs = draw.normal(scale=seeds, size=(3, 1)) + draw.normal(size=50) + draw.normal(scale=noise, size=(3, 50))
        mean = between_and_within(runs).mean
        held += mean.low <= 0 <= mean.high
        naive += abs(runs.mean()) <= 1.96 * runs.std() / math.sqrt(150)
    assert held / 1000 > 0.92
    assert naive / 1000 < 0.9
