"""At which rate the share of good requests falls to the wanted one, from stages at several rates.

Near the limit the logarithm of the share that is not good grows about evenly with the rate, as the tail of the waiting
time in a queue does (Kleinrock, *Queueing Systems*, 1975). A line through what all stages found is therefore a better
estimate than the verdict on any one of them, which random arrivals make a matter of luck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Requests that wait in one queue are good or bad together, so they say less than as many independent ones would.
_TOGETHER = 10.0
# The line is straight near the wanted share only: the further off a stage is (in units of the logarithm), the less it
# counts.
_NEAR = 1.5
# What is taken of its slope before stages say better: by how much the logarithm of the missed share grows with that of
# the rate, and how far that may be off. Queues of 1 to 100 slots at 60 to 95% of their capacity have 3 to 20.
_SLOPE, _SLOPE_ERROR, _LEAST_SLOPE = 8.0, 8.0, 1.0
# Where the missed share is so many times off the allowed one, no luck can have made it so.
_SURELY = 3.0
# How far beyond the only such stages the answer is at least.
_BEYOND = 1.05


@dataclass(frozen=True)
class Attained:
    """What a stage at ``rate`` requests/s found: ``good`` of ``ended`` requests were good."""

    rate: float
    good: int
    ended: int

    @property
    def missed(self) -> float:
        """Share that was not good, never quite 0 or 1."""
        return (self.ended - self.good + 0.5) / (self.ended + 1)


def bounds(stages: Sequence[Attained], wanted: float) -> tuple[float, float]:
    """Return the highest rate that was surely met and the lowest that surely was not; 0 and infinity where none was.

    Stages that contradict each other bound nothing.
    """
    allowed = max(1 - wanted, 1e-3)
    low = max((stage.rate for stage in stages if stage.missed * _SURELY <= allowed), default=0.0)
    high = min((stage.rate for stage in stages if stage.missed >= allowed * _SURELY), default=math.inf)
    return (low, high) if low < high else (0.0, math.inf)


def crossing(stages: Sequence[Attained], wanted: float) -> tuple[float, float]:
    """Return the rate at which the share of good requests is ``wanted``, and the standard error of its logarithm.

    It lies between the :func:`bounds`.

    Args:
        stages: at least one.
        wanted: 0 to 1.

    """
    places = np.log([stage.rate for stage in stages])
    missed = np.array([stage.missed for stage in stages])
    allowed = max(1 - wanted, 1e-3)
    heights = np.log(missed) - math.log(allowed)
    # The variance of the logarithm of a binomial share, and what the line is off by at that distance. The share is the
    # wanted one: with what the stage found, those that missed more by luck would count for more.
    variances = _TOGETHER * (1 - allowed) / (allowed * np.array([stage.ended + 1 for stage in stages]))
    weights = 1 / (variances + (heights / _NEAR) ** 4 / 4)
    middle = float(np.average(places, weights=weights))
    # Least squares with what is known of the slope beforehand as one more observation (Bayesian linear regression).
    certainty = float(weights @ (places - middle) ** 2) + _SLOPE_ERROR**-2
    slope = (float(weights @ ((places - middle) * heights)) + _SLOPE * _SLOPE_ERROR**-2) / certainty
    slope = max(slope, _LEAST_SLOPE)
    distance = -float(np.average(heights, weights=weights)) / slope
    error = math.sqrt(1 / float(weights.sum()) + distance**2 / certainty) / slope
    found = math.exp(middle + distance)
    low, high = bounds(stages, wanted)
    if not low < found < high:
        if low and math.isfinite(high):
            found = math.sqrt(low * high)
        else:
            found = low * _BEYOND if found <= low else high / _BEYOND
    return found, error
