"""How requests of an open loop follow each other, on a time in which one is due every second on average.

A shape stretches that time to its rate, so that every process goes with every shape (time rescaling: Cox and Isham,
*Point Processes*, 1980).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np


def constant(rng: np.random.Generator, burstiness: float) -> Iterator[float]:
    """Yield 0, 1, 2 and so on."""
    number = 0
    while True:
        yield float(number)
        number += 1


def poisson(rng: np.random.Generator, burstiness: float) -> Iterator[float]:
    """Yield sums of independent gaps of mean 1, gamma distributed with the shape ``burstiness``.

    1 is a Poisson process, below 1 comes in bursts, above 1 is more regular. The first gap is before the first request.
    """
    due = 0.0
    while True:
        due += float(rng.gamma(burstiness, 1.0 / burstiness))
        yield due


ARRIVALS: dict[str, Callable[[np.random.Generator, float], Iterator[float]]] = {
    "constant": constant,
    "poisson": poisson,
}
"""The process of each name that ``--arrival`` takes."""
