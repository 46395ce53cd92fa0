"""The paired bootstrap: how far a figure of resampled questions lies from that of the questions asked.

Questions are drawn with replacement, a whole cluster at a time where they share a document, and the answers of both
models to a question are drawn together (Efron and Tibshirani 1993, chapters 8 and 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy import optimize, stats

from bench.schema import Estimate
from bench.statistics.counts import LEVEL, POWER

RESAMPLES, SEED = 10_000, 20_190_909
BLOCK = 4_000_000
"""Numbers drawn at a time, which bounds memory."""


def resamples(units: int) -> Iterator[np.ndarray]:
    """Yield how often each unit is drawn, int64 [a number of resamples, units]; the same every time."""
    draw = np.random.default_rng(SEED)
    step = max(min(BLOCK // units, RESAMPLES), 1)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = draw.integers(units, size=(rows, units)) + np.arange(rows)[:, None] * units
        yield np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)


def drawn(units: int, figure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return a figure of every resample, float [10,000]; it is given counts [rows, units] and returns [rows]."""
    return np.concatenate([figure(counts) for counts in resamples(units)])


def around(value: float, units: int, figures: np.ndarray) -> tuple[Estimate, float]:
    """Return a value with its bootstrapped error and 95% interval, and p of its being 0.

    Args:
        value: the figure of the units as they are.
        units: questions, or clusters of them; at least 2.
        figures: of every resample.

    What counts is how far resamples lie from their own mean: a figure that chance makes too large, such as a
    calibration error, is so twice in a resample. Resamples of few units spread too little, by (n - 1) / n, and their
    quantiles are those of a normal distribution where Student's are right; distances are stretched by both (Hesterberg
    2015, "What teachers should know about the bootstrap", on narrowness bias). The interval is symmetric and excludes 0
    just when p is below 0.05. p counts the sample itself as a resample, so that it is never 0 (Davison and Hinkley
    1997, equation 4.11).
    """
    stretch = math.sqrt(units / (units - 1))
    distance = np.abs(figures - figures.mean()) * stretch
    error = float(np.sqrt((distance**2).mean()))
    distance *= float(stats.t.ppf(0.975, units - 1) / stats.norm.ppf(0.975))
    reach = float(np.quantile(distance, 0.95))
    return Estimate(value, error, value - reach, value + reach, units), (1 + int((distance >= abs(value)).sum())) / (
        1 + len(figures)
    )


def smallest_mean(change: Estimate) -> float | None:
    """Return the smallest difference that a paired t-test shows with 80% power, of units that spread like these."""
    from statsmodels.stats.power import TTestPower

    if not change.standard_error:
        return None
    root = math.sqrt(change.n)

    def missing(errors: float) -> float:
        # What a two-sided test shows of the other sign is nothing, but scipy makes it NaN.
        return float(TTestPower().power(errors / root, change.n, LEVEL / 2, alternative="larger")) - POWER

    # In standard errors, 16.4 for 2 units and 5.7 for 3; solve_power of statsmodels finds a negative one for 73.
    return float(optimize.brentq(missing, 2, 17 if change.n == 2 else 6)) * change.standard_error
