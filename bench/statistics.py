"""Point estimates with their uncertainty.

Tokens inside one window of text depend on each other, so the unit of every text metric is the window: the standard
error is that of the mean over windows, and the interval uses Student's t because there are few of them. Differences
from the baseline are taken window by window, which removes the (much larger) spread between texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from bench.schema import Estimate


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value a window, its standard error and 95% interval.

    With a single window the error is unknown: ``standard_error``, ``low`` and ``high`` are None.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    error = float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return Estimate(mean, error, mean - reach, mean + reach, n)


def exp_estimate(log_estimate: Estimate, shift: float = 0.0) -> Estimate:
    """Return exp(x) + shift of an estimate x; the error by the delta method, the interval by mapping its ends."""
    value = math.exp(log_estimate.value)
    error = None if log_estimate.standard_error is None else value * log_estimate.standard_error
    low = None if log_estimate.low is None else math.exp(log_estimate.low) + shift
    high = None if log_estimate.high is None else math.exp(log_estimate.high) + shift
    return Estimate(value + shift, error, low, high, log_estimate.n)


def proportion(successes: int, trials: int) -> Estimate:
    """Return a success rate with Wilson's 95% score interval, which stays sensible at 0% and 100%."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials")
    p = successes / trials
    interval = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return Estimate(p, math.sqrt(p * (1 - p) / trials), float(interval.low), float(interval.high), trials)


@dataclass(frozen=True)
class Paired:
    """A comparison of two configurations, question by question.

    Attributes:
        change: mean difference, tested less baseline.
        p: two-sided, of no change: McNemar's exact test (1947; the binomial test of the questions that differ) where
            all scores are 0 or 1, else the paired t-test.
        more: questions with a higher score than the baseline's.
        fewer: questions with a lower one.

    """

    change: Estimate
    p: float
    more: int
    fewer: int


def paired(tested: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare scores of the same questions, in the same order."""
    differences = [a - b for a, b in zip(tested, baseline, strict=True)]
    more, fewer = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if not more + fewer:
        p = 1.0
    elif set(tested) | set(baseline) <= {0.0, 1.0} or len(differences) == 1:
        p = float(stats.binomtest(more, more + fewer).pvalue)
    else:
        p = float(stats.ttest_rel(tested, baseline).pvalue)
    return Paired(mean_estimate(differences), p, more, fewer)
