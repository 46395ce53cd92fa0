"""When the requests of an open loop are meant to start, whatever the server does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loadtest.stage_spec import ARRIVALS


def intended_starts(rate: float, arrival: str, rng: np.random.Generator, burstiness: float = 1.0) -> Iterator[float]:
    """Yield the intended start of each request, in seconds after the first moment of the load, without end.

    Args:
        rate: mean requests per second, above 0.
        arrival: ``constant`` starts one every ``1 / rate`` seconds, the first at 0; ``poisson`` draws independent gaps
            of mean ``1 / rate``, the first gap before the first request.
        rng: source of the gaps.
        burstiness: shape of the gamma distribution of Poisson-like gaps: 1 is a Poisson process, below 1 comes in
            bursts, above 1 is more regular.

    """
    if arrival == "constant":
        number = 0
        while True:
            yield number / rate
            number += 1
    elif arrival == "poisson":
        start = 0.0
        while True:
            start += float(rng.gamma(burstiness, 1.0 / (rate * burstiness)))
            yield start
    else:
        raise ValueError(f"unknown arrival process {arrival!r}; known: {', '.join(ARRIVALS)}")
