"""Histogram buckets that are fine enough for quantiles: each bound is a fixed factor above the one before."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

# A quantile lies somewhere in its bucket, so this bounds its error. Prometheus' native histograms would need no bounds,
# but prometheus_client can read them only, not serve them.
FACTOR = 1.05


def bounds(low: float, high: float, factor: float = FACTOR) -> tuple[float, ...]:
    """Return upper bounds from ``low`` to ``high`` seconds, to 4 digits, each at most ``factor`` above the one before.

    Args:
        low: first bound; what is below it shares one bucket.
        high: the last bound; what is above that is counted in ``+Inf`` only.
        factor: of a bound to the next, above 1.

    """
    count = math.ceil(math.log(high / low) / math.log(factor) - 1e-9)
    step = (high / low) ** (1 / count)
    return tuple(float(f"{low * step**number:.4g}") for number in range(count + 1))


FIRST_TOKEN = bounds(0.001, 120)
TOKEN = bounds(0.0005, 10)
WHOLE = bounds(0.005, 600)
LAG = bounds(0.0001, 60, 1.2)


class Buckets:
    """Counts of values by bucket, and their sum.

    prometheus_client's own histogram looks through its bounds one by one, which costs more than all else that a chunk
    of a stream costs when there are 200 of them.
    """

    def __init__(self, upper: tuple[float, ...]) -> None:
        self._upper = upper
        self._counts = [0] * (len(upper) + 1)
        self._sum = 0.0

    def add(self, values: Iterable[float]) -> None:
        """Count values, in seconds."""
        upper, counts = self._upper, self._counts
        for value in values:
            counts[bisect_left(upper, value)] += 1
            self._sum += value

    def snapshot(self) -> tuple[list[tuple[str, float]], float]:
        """Return the cumulative counts with their bounds as text, and the sum of the values."""
        names = [*map(repr, self._upper), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True)), self._sum
