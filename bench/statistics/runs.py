"""Repeated runs of what has a seed: how much of a score is the seed's, and how much the questions'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bench.schema import Estimate

RUNS_NEEDED = 3


@dataclass(frozen=True)
class Variance:
    """Scores of several runs.

    Attributes:
        mean: over runs, each run's mean counting alike. Its error and 95% interval hold both the choice of seeds and
            that of questions. ``n`` counts runs. With fewer than 3 runs there is no error and no interval.
        between: variance of a run's mean because of its seed, the questions staying the same; 0 if runs differ no more
            than their questions explain, None for one run.
        within: variance of a run's mean because of its questions, the square of its usual standard error; None where
            runs have one score each. The sum of both is the variance of the mean of one more run of other questions.

    """

    mean: Estimate
    between: float | None
    within: float | None


def between_and_within(runs: Sequence[Sequence[float]]) -> Variance:
    """Return the variance between and within runs, and the mean with an interval that holds both.

    Args:
        runs: of each run its scores. Where all have as many (at least 2), the same place is the same question, and the
            variances are those of a two-way layout with random runs and questions (Searle, Casella and McCulloch 1992,
            chapter 4; degrees of freedom by Satterthwaite 1946). Else runs asked other questions: the spread of their
            means then holds both.

    Raises:
        ValueError: no runs, or an empty one.

    """
    if not len(runs) or not all(len(run) for run in runs):
        raise ValueError("each run needs a score")
    count, sizes = len(runs), {len(run) for run in runs}
    means = np.array([np.mean(run) for run in runs])
    mean = float(means.mean())
    within = None
    if min(sizes) > 1:
        within = float(np.mean([np.var(run, ddof=1) / len(run) for run in runs]))
    if count == 1:
        return Variance(Estimate(mean, None, None, None, 1), None, within)
    spread = float(means.var(ddof=1))
    if len(sizes) == 1 and within is not None:
        table = np.array(runs, float)
        questions = table.shape[1]
        residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        noise = float((residual**2).sum()) / ((count - 1) * (questions - 1))
        by_run, by_question = questions * spread, count * float(table.mean(0).var(ddof=1))
        between = max(by_run - noise, 0.0) / questions
        # Mean squares with their weights in the variance of the mean, and their degrees of freedom.
        parts = [(by_question, questions - 1)]
        if between:
            parts += [(by_run, count - 1), (-noise, (count - 1) * (questions - 1))]
        parts = [(square / (count * questions), degrees) for square, degrees in parts]
    else:
        between = max(spread - (within or 0.0), 0.0)
        parts = [(spread / count, count - 1)]
    if count < RUNS_NEEDED:
        return Variance(Estimate(mean, None, None, None, count), between, within)
    variance = max(math.fsum(part for part, _ in parts), 0.0)
    error = math.sqrt(variance)
    doubt = math.fsum(part**2 / degrees for part, degrees in parts)
    reach = error * float(stats.t.ppf(0.975, variance**2 / doubt)) if doubt else 0.0
    return Variance(Estimate(mean, error, mean - reach, mean + reach, count), between, within)
