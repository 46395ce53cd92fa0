"""Comparison of right and wrong answers to the same questions: only those where two models differ tell anything.

``more`` and ``fewer`` are counts of questions that only the tested or only the baseline model answered rightly, of
``trials`` questions.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, stats

LEVEL, POWER = 0.05, 0.8
"""Of two-sided tests, and with which the smallest difference would have been shown."""


def mcnemar(more: int, fewer: int) -> float:
    """Return p of no difference, two-sided: McNemar's test (1947), exact."""
    return float(stats.binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def score_interval(more: int, fewer: int, trials: int) -> tuple[float, float]:
    """Return the 95% score interval of the difference of two paired shares (Tango 1998, equations 19 to 24).

    Unlike the interval of a mean of differences it has a width where no answer differs, of about 3.8 questions to both
    sides, and its coverage holds for few differences, which is what compression makes.
    """
    reach = float(stats.norm.ppf(1 - LEVEL / 2))

    def score(difference: float, sign: int) -> float:
        """Return how far the data is from a true difference, in standard errors, less the interval's reach."""
        a = 2 * trials
        b = -more - fewer + (2 * trials - more + fewer) * difference
        c = -fewer * difference * (1 - difference)
        lost = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = trials * (2 * lost + difference * (1 - difference))
        away = more - fewer - trials * difference
        return away - sign * reach * math.sqrt(max(variance, 0.0))

    # What was seen is a root of both where its variance is 0; the interval's ends are the other ones.
    seen, beside = (more - fewer) / trials, 1e-9
    low = -1.0 if seen == -1 else optimize.brentq(score, -1, seen - beside, args=(1,))
    high = 1.0 if seen == 1 else optimize.brentq(score, seen + beside, 1, args=(-1,))
    return float(low), float(high)


def smallest_difference(differing: int, trials: int) -> float | None:
    """Return the smallest true difference of two paired shares that McNemar's exact test shows with 80% power.

    Of ``trials`` questions as many are taken to differ as were seen to, or as many more as the difference itself needs.
    None if no difference would be shown: that takes 6 questions at least.
    """
    share = differing / trials

    def missing(difference: float) -> float:
        differ = max(share, difference)
        low, high = stats.binom.ppf([1e-9, 1 - 1e-9], trials, differ)
        counts = np.arange(low, high + 1)
        # The most answers against a difference with which the two-sided test still shows one; -1 if none.
        most = stats.binom.ppf(LEVEL / 2, counts, 0.5)
        most -= stats.binom.cdf(most, counts, 0.5) > LEVEL / 2
        against = (1 - difference / differ) / 2
        shown = stats.binom.cdf(most, counts, against) + stats.binom.cdf(most, counts, 1 - against)
        return float((stats.binom.pmf(counts, trials, differ) * shown).sum()) - POWER

    return float(optimize.brentq(missing, 1e-12, 1.0, xtol=1e-6)) if missing(1.0) >= 0 else None
