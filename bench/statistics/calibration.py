"""Whether a model is as often right as it is sure: expected calibration error and Brier score."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from bench.schema import Estimate
from bench.statistics import bootstrap
from bench.statistics.estimates import codes

BINS = 15


def brier(probabilities: Sequence[float], label: int) -> float:
    """Return the Brier score of one question (Brier 1950): 0 for a sure right answer, 2 for a sure wrong one.

    Args:
        probabilities: of each choice; they add up to 1.
        label: which choice is right, from 0.

    Raises:
        ValueError: there is no such choice.

    """
    if not 0 <= label < len(probabilities):
        raise ValueError(f"choice {label} of {len(probabilities)}")
    return math.fsum((p - (index == label)) ** 2 for index, p in enumerate(probabilities))


def expected_calibration_error(
    confidence: Sequence[float], correct: Sequence[float], bins: int = BINS, debiased: bool = True
) -> float:
    """Return how far confidence and accuracy are apart, on average over questions.

    Args:
        confidence: probability of the chosen answer, 0 to 1, one a question.
        correct: 1 where it was right, else 0.
        bins: of equally many questions of similar confidence; fewer where there were not 2 questions for each.
        debiased: whether a part of what chance alone makes is taken off, see below; the result may then be a little
            below 0.

    The plugin estimate ``sum_b n_b / n |confidence_b - accuracy_b|`` is above 0 for a calibrated model too, the more so
    the fewer questions a bin has. Debiasing is that of Kumar, Liang and Ma (2019, "Verified uncertainty calibration",
    section 5 and its appendix; ``get_ece`` of their library): a bin's accuracy is taken for normal with variance
    ``accuracy (1 - accuracy) / n_b``, and the plugin estimate is lowered by as much as drawing it anew would raise it.
    They draw; the mean of ``|x|`` of a normal x has a closed form (Leone, Nelson and Nottingham 1961). Of a model that
    is calibrated this takes off four tenths of what chance makes; where accuracy and confidence are further apart than
    a bin's accuracy varies, chance makes nothing and little is taken off.

    Raises:
        ValueError: lengths differ, fewer than 2 questions, or no bins.

    """
    if len(confidence) != len(correct) or len(confidence) < 2 or bins < 1:
        raise ValueError(f"{len(confidence)} confidences, {len(correct)} answers (at least 2 of both), {bins} bins")
    return float(_errors(confidence, correct, bins, debiased)(np.ones((1, len(confidence))))[0])


Answers = tuple[Sequence[float], Sequence[float]]
"""Of each question the confidence, and whether the answer was right."""


@dataclass(frozen=True)
class Calibration:
    """A model's calibration error beside the baseline's.

    Attributes:
        error: debiased; interval and standard error by the bootstrap.
        change: tested less baseline, by the paired bootstrap; None without a baseline.
        p: of no change.
        smallest: smallest true change that would have been shown with 80% power at two-sided 5%.

    """

    error: Estimate
    change: Estimate | None = None
    p: float | None = None
    smallest: float | None = None


def calibrated(tested: Answers, baseline: Answers | None, clusters: Sequence[Hashable] | None = None) -> Calibration:
    """Return a model's calibration error and, with a baseline's answers to the same questions, its change.

    Args:
        tested: as of :func:`expected_calibration_error`.
        baseline: None without one.
        clusters: a label a question; questions of one label are drawn together.

    """
    questions = len(tested[0])
    groups = codes(clusters, questions)
    units = questions if groups is None else int(groups.max()) + 1
    errors = [_errors(*one, BINS, True) for one in (tested, baseline) if one is not None]
    own, *other = (float(error(np.ones((1, questions)))[0]) for error in errors)
    if units < 2:
        unknown = Calibration(Estimate(own, None, None, None, units))
        return replace(unknown, change=Estimate(own - other[0], None, None, None, units), p=1.0) if other else unknown

    def draw(counts: np.ndarray) -> np.ndarray:
        weights = counts if groups is None else counts[:, groups]
        return np.stack([error(weights) for error in errors], 1)

    drawn = bootstrap.drawn(units, draw)
    error, _ = bootstrap.around(own, units, drawn[:, 0])
    if not other:
        return Calibration(error)
    change, p = bootstrap.around(own - other[0], units, drawn[:, 0] - drawn[:, 1])
    return Calibration(error, change, p, bootstrap.smallest_mean(change))


def _errors(
    confidence: Sequence[float], correct: Sequence[float], bins: int, debiased: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Return what makes errors [rows] of counts of questions [rows, questions], in the bins of questions as asked."""
    questions = len(confidence)
    bins = min(bins, max(questions // 2, 1))
    place = np.empty(questions, int)
    place[np.argsort(confidence, kind="stable")] = np.arange(questions) * bins // questions
    member = np.eye(bins)[place]
    # For each bin how many questions there are, the sum of their confidences, and of the right answers.
    table = np.hstack([member, member * np.asarray(confidence, float)[:, None], member * np.asarray(correct)[:, None]])

    def errors(counts: np.ndarray) -> np.ndarray:
        sizes, sure, right = np.split(counts.astype(float) @ table, 3, axis=1)
        filled = np.maximum(sizes, 1)
        accuracy = right / filled
        error = np.abs(sure / filled - accuracy)
        if debiased:
            spread = np.sqrt(np.clip(accuracy * (1 - accuracy), 0, None) / filled)
            noisy = spread > 0
            error[noisy] = 2 * error[noisy] - stats.foldnorm.mean(error[noisy] / spread[noisy], scale=spread[noisy])
        return (sizes * error).sum(1) / sizes.sum(1)

    return errors
