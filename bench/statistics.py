"""Point estimates with their uncertainty.

Tokens inside one window of text depend on each other, so the unit of every text metric is the window: the standard
error is that of the mean over windows, and the interval uses Student's t because there are few of them. Differences
from the baseline are taken window by window, which removes the (much larger) spread between texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from bench.quality.schema import Estimate

Z95 = NormalDist().inv_cdf(0.975)


def student_t(df: int) -> float:
    """Return the 97.5% quantile of Student's t with ``df`` degrees of freedom.

    Closed forms for 1 and 2, and the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5) from 3 on, where it is
    within 0.2%.
    """
    if df < 1:
        raise ValueError("Student's t needs at least one degree of freedom")
    if df == 1:
        return math.tan(math.pi * 0.475)
    if df == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / df + second / df**2 + third / df**3 + fourth / df**4


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
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    reach = student_t(n - 1) * error
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
    z2 = Z95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = Z95 / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    low = 0.0 if successes == 0 else max(0.0, centre - reach)
    high = 1.0 if successes == trials else min(1.0, centre + reach)
    return Estimate(p, math.sqrt(p * (1 - p) / trials), low, high, trials)
