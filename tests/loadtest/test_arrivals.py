from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from loadtest.shapes.arrivals import ARRIVALS
from loadtest.shapes.shape import Hold


def starts(arrival: str, rate: float, count: int, burstiness: float = 1.0, seed: int = 1) -> np.ndarray:
    arrivals = ARRIVALS[arrival](np.random.default_rng(seed), burstiness)
    return np.array(list(islice(Hold(rate).starts(arrivals), count)))


def test_constant_arrivals_do_not_drift() -> None:
    times = starts("constant", 3.0, 3001)
    assert times[0] == 0
    assert times[3000] == pytest.approx(1000, abs=1e-9)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_random_gaps_have_their_rate_and_variation(burstiness: float, variation: float) -> None:
    gaps = np.diff(starts("poisson", 5.0, 40_000, burstiness), prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_poisson_counts_are_poisson() -> None:
    counts = np.bincount(starts("poisson", 10.0, 50_000).astype(int))[:-1]
    assert counts.mean() == pytest.approx(10, rel=0.03)
    assert counts.var() == pytest.approx(10, rel=0.08)


def test_a_seed_repeats_the_arrivals() -> None:
    assert (starts("poisson", 2, 50, seed=4) == starts("poisson", 2, 50, seed=4)).all()
    assert (starts("poisson", 2, 50, seed=4) != starts("poisson", 2, 50, seed=5)).all()
