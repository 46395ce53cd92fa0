"""Point estimates with their uncertainty.

Tokens inside one window of text depend on each other, so the unit of every text metric is the window: the standard
error is that of the mean over windows, and the interval uses Student's t because there are few of them. Differences
from the baseline are taken window by window, which removes the (much larger) spread between texts. Questions are units
of their own, unless they share a document, which then is the unit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

from bench.schema import Estimate


def mean_estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Return the mean of one value a unit, its standard error and 95% interval by Student's t.

    Args:
        values: one a window or question; at least one.
        clusters: a label each: values of one label depend on each other, such as questions about one document. The
            error is then the cluster-robust one (Liang and Zeger 1986) and ``n`` counts clusters.

    Returns:
        The estimate. With a single unit the error is unknown: ``standard_error``, ``low`` and ``high`` are None.

    Raises:
        ValueError: no values, or another number of labels.

    """
    if not len(values):
        raise ValueError("no values")
    mean = math.fsum(values) / len(values)
    groups = codes(clusters, len(values))
    n = len(values) if groups is None else int(groups.max()) + 1
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    error = float(stats.sem(values)) if groups is None else clustered_error(values, groups)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return Estimate(mean, error, mean - reach, mean + reach, n)


def codes(clusters: Sequence[Hashable] | None, count: int) -> np.ndarray | None:
    """Return labels as numbers from 0, in the order in which they appear; None where no two values share one.

    Raises:
        ValueError: there are not ``count`` labels.

    """
    if clusters is None:
        return None
    if len(clusters) != count:
        raise ValueError(f"{len(clusters)} labels of clusters for {count} values")
    number = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    return None if len(number) == count else np.array([number[label] for label in clusters])


def clustered_error(values: Sequence[float], groups: np.ndarray) -> float:
    """Return the standard error of a mean whose values depend on each other within groups, numbered from 0."""
    from statsmodels.regression.linear_model import OLS

    fit = OLS(np.asarray(values, float), np.ones(len(groups))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    return float(fit.bse[0])


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
