"""Exact statistics of many values; not in the summary, so that processes which only send need not load all of that."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from loadtest.results.schema import Distribution


def distribution(values: Sequence[float] | array[float]) -> Distribution | None:
    """Return exact statistics of ``values`` (linear interpolation between ranks), or None when there are none."""
    if len(values) == 0:
        return None
    data = np.asarray(values, dtype=np.float64)
    p50, p90, p95, p99 = np.percentile(data, (50, 90, 95, 99))
    numbers = (data.mean(), data.std(), data.min(), p50, p90, p95, p99, data.max())
    return Distribution(len(data), *(round(float(number), 4) for number in numbers))
