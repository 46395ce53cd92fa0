"""Estimates from one run whose requests depend on each other, by batch means.

Requests that queue behind each other are alike, so that n of them say less than n independent ones would. A run is cut
into batches of neighbours; the batches are nearly independent, and how much they differ says how much the whole run can
be trusted (Schmeiser 1982, "Batch size effects in the analysis of simulation output": 10 to 30 batches are enough).

A percentile is treated through the fraction of values below it, which is a mean, so no density has to be estimated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from loadtest.statistics.figures import FRACTIONS, RATES, Figure
from loadtest.statistics.samples import Floats, Samples

BATCHES = 10
LEAST_REQUESTS = 2 * BATCHES
"""Fewer requests have no interval."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty: ``variance`` is that of ``value``, on ``df`` degrees of freedom."""

    value: float
    variance: float
    df: float


def _ratio(sums: NDArray[Any], weights: Floats) -> Estimate:
    """Return sum of ``sums`` over sum of ``weights``, both by batch, with the variance of that ratio."""
    total, used = float(weights.sum()), weights > 0
    value = float(sums.sum()) / total
    count = int(used.sum())
    if count < 2:
        return Estimate(value, math.inf, 1.0)
    errors = sums - value * weights
    return Estimate(value, float(count / (count - 1) * (errors**2).sum() / total**2), count - 1.0)


def _batch_of(samples: Samples) -> NDArray[np.int64]:
    """Return the batch of each request: equal numbers of neighbours."""
    return np.arange(len(samples)) * BATCHES // max(len(samples), 1)


def fraction_below(samples: Samples, figure: Figure, limit: float) -> Estimate:
    """Return which fraction of a quantity's values is at most ``limit``."""
    ragged = samples.quantities[figure.of]
    batch = _batch_of(samples)[ragged.owner]
    below = np.bincount(batch, ragged.values <= limit, BATCHES)
    return _ratio(below, np.bincount(batch, minlength=BATCHES).astype(np.float64))


def estimate(samples: Samples, figure: Figure) -> Estimate:
    """Return a mean, fraction or rate with its variance."""
    if figure.kind == "fraction":
        each = FRACTIONS[figure.of](samples)
        batch = _batch_of(samples)
        return _ratio(np.bincount(batch, each, BATCHES), np.bincount(batch, minlength=BATCHES).astype(np.float64))
    if figure.kind == "rate":
        # Batches of equal time: what ended in each.
        # In a part of a stage, that is all which ended between its first and its last start, whenever it began.
        whole = samples.whole or samples
        begin, end = float(samples.start[0]), float(samples.end.max() if whole is samples else samples.start[-1])
        length = max(end - begin, 1e-6)
        inside = (whole.end >= begin) & (whole.end <= end)
        slot = np.minimum(((whole.end[inside] - begin) / length * BATCHES).astype(np.int64), BATCHES - 1)
        amounts = np.bincount(slot, RATES[figure.of](whole)[inside], BATCHES)
        return _ratio(amounts, np.full(BATCHES, length / BATCHES))
    ragged = samples.quantities[figure.of]
    batch = _batch_of(samples)[ragged.owner]
    weights = np.bincount(batch, minlength=BATCHES).astype(np.float64)
    return _ratio(np.bincount(batch, ragged.values, BATCHES), weights)


def value(samples: Samples, figure: Figure) -> float:
    """Return the figure itself; percentiles with linear interpolation between ranks, as in the summary."""
    if figure.kind == "quantile":
        return float(np.quantile(samples.quantities[figure.of].values, figure.p))
    return estimate(samples, figure).value


def interval(samples: Samples, figure: Figure) -> tuple[float | None, float | None]:
    """Return the 95% confidence interval of a figure within one run.

    A bound is None where the run is too short to have it: fewer than 20 requests, or a percentile so high that the
    true one may lie above every value that was seen.
    """
    if len(samples) < LEAST_REQUESTS:
        return None, None
    if figure.kind == "quantile":
        values = samples.quantities[figure.of].values
        found = fraction_below(samples, figure, float(np.quantile(values, figure.p)))
        # No fewer errors than independent requests would have: so few of them exceed a high percentile that their
        # batches may be equal by luck.
        owners = len(np.unique(samples.quantities[figure.of].owner))
        variance = max(found.variance, figure.p * (1 - figure.p) / owners)
        reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, found.df)) * math.sqrt(variance)
        low, high = figure.p - reach, figure.p + reach
        return (
            float(np.quantile(values, low)) if low > 0 else None,
            float(np.quantile(values, high)) if high < 1 else None,
        )
    found = estimate(samples, figure)
    if not math.isfinite(found.variance):
        return None, None
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, found.df)) * math.sqrt(found.variance)
    low, high = found.value - reach, found.value + reach
    return max(low, 0.0), min(high, 1.0) if figure.kind == "fraction" else high
