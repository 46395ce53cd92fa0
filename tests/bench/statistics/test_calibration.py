import math

import numpy as np
import pytest

from bench.statistics import brier, calibrated, expected_calibration_error


def test_brier_by_hand():
    assert brier([0.5, 0.3, 0.2], 0) == pytest.approx(0.25 + 0.09 + 0.04)
    assert brier([0.5, 0.3, 0.2], 2) == pytest.approx(0.25 + 0.09 + 0.64)
    assert (brier([1.0, 0.0], 0), brier([1.0, 0.0], 1)) == (0.0, 2.0)
    with pytest.raises(ValueError, match="choice 2 of 2"):
        brier([0.5, 0.5], 2)


CONFIDENCE, CORRECT = [0.9, 0.2, 0.8, 0.4, 0.3, 0.7], [1, 0, 0, 1, 0, 1]


def test_the_plugin_error_by_hand():
    # Two bins of three: 0.2, 0.3, 0.4 with 1 right, |0.3 - 1/3|; 0.7, 0.8, 0.9 with 2 right, |0.8 - 2/3|.
    found = expected_calibration_error(CONFIDENCE, CORRECT, bins=2, debiased=False)
    assert found == pytest.approx((1 / 30 + 2 / 15) / 2)
    # One bin: |0.55 - 1/2|.
    assert expected_calibration_error(CONFIDENCE, CORRECT, bins=1, debiased=False) == pytest.approx(0.05)
    # Fifteen bins asked for, three made, of two questions: |0.25 - 0|, |0.55 - 1|, |0.85 - 1/2|.
    assert expected_calibration_error(CONFIDENCE, CORRECT, debiased=False) == pytest.approx((0.25 + 0.45 + 0.35) / 3)


def test_the_debiased_error_by_hand():
    """One bin of 6: spread sqrt(1/4 / 6) = 0.204124; the mean of |x| of a normal x at 0.05 is 0.167734."""
    # 0.204124 * sqrt(2 / pi) * exp(-0.03) + 0.05 * (2 * Phi(0.244949) - 1)
    mean = 0.204124 * 0.797885 * 0.970446 + 0.05 * (2 * 0.596752 - 1)
    assert mean == pytest.approx(0.167734, abs=1e-5)
    assert expected_calibration_error(CONFIDENCE, CORRECT, bins=1) == pytest.approx(0.05 - (mean - 0.05), abs=1e-5)
    # Bins that are all right or all wrong vary by nothing.
    assert expected_calibration_error([0.1, 0.2, 0.9, 0.8], [0, 0, 1, 1], bins=2) == pytest.approx(0.15)


def test_debiasing_is_what_the_paper_draws():
    """Kumar, Liang and Ma's own way: bins' accuracies are drawn 50,000 times, and the mean excess is taken off."""
    draw = np.random.default_rng(0)
    confidence = np.sort(draw.uniform(0.25, 1, 150))
    correct = (draw.uniform(size=150) < confidence**1.3).astype(float)
    sure, right = confidence.reshape(15, 10).mean(1), correct.reshape(15, 10).mean(1)
    plugin = np.abs(sure - right).mean()
    noisy = draw.normal(right, np.sqrt(right * (1 - right) / 10), size=(50_000, 15))
    excess = np.abs(sure - noisy).mean() - plugin
    assert expected_calibration_error(confidence, correct, debiased=False) == pytest.approx(plugin)
    assert expected_calibration_error(confidence, correct) == pytest.approx(plugin - excess, abs=2e-4)


def test_what_chance_makes_of_a_calibrated_model():
    """With spread s in a bin the plugin estimate is s sqrt(2 / pi) on average; drawn anew it is sqrt(2) times that."""
    draw, found = np.random.default_rng(1), []
    for _ in range(300):
        confidence = draw.uniform(0.25, 1, 400)
        correct = draw.uniform(size=400) < confidence
        found.append([expected_calibration_error(confidence, correct, debiased=way) for way in (False, True)])
    plugin, debiased = np.mean(found, axis=0)
    assert plugin > 0.06
    assert debiased / plugin == pytest.approx(2 - math.sqrt(2), abs=0.04)


def overconfident(draw, excess, questions=200):
    """Confidences that are too high by ``excess``, of two models that are sure and right alike."""
    truth = np.clip(draw.beta(4, 2, questions), 0, 1 - excess)
    return truth, (draw.uniform(size=questions) < truth).astype(float), truth + excess


def test_the_change_is_held_by_its_interval():
    draw, held, shown = np.random.default_rng(2), 0, 0
    for _ in range(40):
        truth, correct, high = overconfident(draw, 0.15)
        base = np.clip(truth + 0.1, 0, 1)
        found = calibrated((high, correct), (base, correct))
        held += found.change.low <= 0.05 <= found.change.high
        shown += found.p < 0.05
    assert held >= 34
    assert shown > 25


def test_no_change_between_the_same_answers():
    draw = np.random.default_rng(3)
    _, correct, high = overconfident(draw, 0.1)
    found = calibrated((high, correct), (high, correct))
    assert (found.change.value, found.p, found.smallest) == (0.0, 1.0, None)
    assert found.error.low < expected_calibration_error(high, correct) == found.error.value < found.error.high
    alone = calibrated((high, correct), None)
    assert (alone.error, alone.change) == (found.error, None)
    # Questions of one document count once.
    twice = [np.repeat(one, 2) for one in (high, correct)]
    clustered = calibrated(twice, None, np.repeat(np.arange(200), 2))
    assert clustered.error.n == 200
    assert clustered.error.standard_error == pytest.approx(found.error.standard_error, rel=0.25)


def test_figures_that_cannot_be():
    for confidence, correct, bins in (([0.5], [1], 15), ([0.5, 0.6], [1], 15), ([0.5, 0.6], [1, 0], 0)):
        with pytest.raises(ValueError, match="at least 2"):
            expected_calibration_error(confidence, correct, bins)
    assert calibrated(([0.5, 0.6], [1, 0]), None, ["a", "a"]).error.low is None
