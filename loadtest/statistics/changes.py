"""By how much a figure changed from A to B, and whether a change beyond a limit is shown.

Within one run each the unit is a batch of requests (:mod:`loadtest.statistics.batches`); with repeated runs it is the
run, which also holds what differs from run to run. All tests are one-sided with a share of 5% of false alarms where the
true change is just at the limit, and fewer where it is below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from loadtest.statistics.batches import LEAST_REQUESTS, Estimate, estimate, fraction_below, value
from loadtest.statistics.figures import Figure
from loadtest.statistics.samples import Samples

_WIDEST = 20.0


@dataclass(frozen=True)
class Change:
    """The change of one figure.

    Attributes:
        a: the figure of A; the mean over its runs when there are several.
        b: that of B.
        change: of fractions b - a, of all others b / a - 1; None when a is 0.
        low: lower bound of the 95% confidence interval of ``change``; None when the data do not bound it.
        high: upper bound.
        unit: what was compared: ``batches`` of requests or ``runs``.

    """

    a: float
    b: float
    change: float | None
    low: float | None
    high: float | None
    unit: str


class Difference:
    """The test that A and B differ by more than a limit.

    Args:
        a: runs of A: one, or at least two.
        b: runs of B, likewise.
        figure: what is compared.

    Raises:
        ValueError: one side has one run, the other several; or a run has fewer than 20 requests.

    """

    def __init__(self, a: Sequence[Samples], b: Sequence[Samples], figure: Figure) -> None:
        if (len(a) == 1) != (len(b) == 1):
            raise ValueError("one side is a single run and the other is repeated")
        self._relative = figure.kind != "fraction"
        values = [np.array([value(run, figure) for run in side]) for side in (a, b)]
        self.a, self.b = (float(each.mean()) for each in values)
        self.unit = "batches" if len(a) == 1 else "runs"
        self._statistic: Callable[[float], tuple[float, float]]
        if self.unit == "runs":
            first, second = (Estimate(float(v.mean()), float(v.var(ddof=1)) / len(v), len(v) - 1.0) for v in values)
            self._statistic = self._of_means(first, second)
        elif min(len(a[0]), len(b[0])) < LEAST_REQUESTS:
            raise ValueError(f"a run of fewer than {LEAST_REQUESTS} requests")
        elif figure.kind == "quantile":
            self._statistic = self._of_quantiles(a[0], b[0], figure)
        else:
            self._statistic = self._of_means(estimate(a[0], figure), estimate(b[0], figure))

    def p_above(self, limit: float) -> float:
        """Return the p-value of "the change is at most ``limit``": small ones show that it is above."""
        t, df = self._statistic(limit)
        return float(stats.t.sf(t, df))

    def p_below(self, limit: float) -> float:
        """Return the p-value of "the change is at least ``limit``"."""
        t, df = self._statistic(limit)
        return float(stats.t.cdf(t, df))

    def change(self) -> Change:
        """Return the change with the interval of all limits that the tests at 2.5% on each side do not reject."""
        if not self._relative:
            point: float | None = self.b - self.a
        else:
            point = self.b / self.a - 1 if self.a else None
        low = high = None
        if point is not None:
            low = self._edge(point, -1, lambda limit: self.p_above(limit) - 0.025)
            high = self._edge(point, 1, lambda limit: self.p_below(limit) - 0.025)
        return Change(self.a, self.b, point, low, high, self.unit)

    def _edge(self, point: float, direction: int, excess: Callable[[float], float]) -> float | None:
        """Return where ``excess`` changes its sign on one side of ``point``; None when it does not."""
        inner, step = point, 0.01
        while step < _WIDEST:
            outer = point + direction * step
            if self._relative and outer <= -1:
                return None
            if excess(outer) < 0:
                if excess(inner) < 0:
                    return point
                return float(optimize.brentq(excess, inner, outer, xtol=1e-5))
            inner, step = outer, step * 2
        return None

    def _of_means(self, a: Estimate, b: Estimate) -> Callable[[float], tuple[float, float]]:
        """Welch's test of b - (1 + limit) a, whose inversion is Fieller's interval; of b - a - limit for fractions."""

        def statistic(limit: float) -> tuple[float, float]:
            factor = 1 + limit if self._relative else 1.0
            distance = b.value - (factor * a.value if self._relative else a.value + limit)
            return _welch(distance, Estimate(0, factor**2 * a.variance, a.df), b)

        return statistic

    @staticmethod
    def _of_quantiles(a: Samples, b: Samples, figure: Figure) -> Callable[[float], tuple[float, float]]:
        """Mood's test at the common percentile: if B / (1 + limit) is like A, as much of both lies below it."""
        of_a, of_b = (side.quantities[figure.of].values for side in (a, b))

        def statistic(limit: float) -> tuple[float, float]:
            common = float(np.quantile(np.concatenate([of_a, of_b / (1 + limit)]), figure.p))
            below_a = fraction_below(a, figure, common)
            below_b = fraction_below(b, figure, common * (1 + limit))
            return _welch(below_a.value - below_b.value, below_a, below_b)

        return statistic


def _welch(distance: float, a: Estimate, b: Estimate) -> tuple[float, float]:
    """Return the t statistic and its degrees of freedom (Welch and Satterthwaite)."""
    variance = a.variance + b.variance
    if not math.isfinite(variance):
        return 0.0, 1.0
    if variance <= 0:
        return (0.0 if distance == 0 else math.copysign(math.inf, distance)), a.df + b.df
    return distance / math.sqrt(variance), variance**2 / (a.variance**2 / a.df + b.variance**2 / b.df)
