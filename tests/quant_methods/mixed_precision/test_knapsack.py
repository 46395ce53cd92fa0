"""The knapsack against every possible choice."""

import itertools
import random

import pytest

from kv_cache.errors import ParetoError
from quant_methods.mixed_precision.knapsack import solve


def brute_force(sizes, losses, capacity):
    best = None
    for choice in itertools.product(*(range(len(row)) for row in sizes)):
        size = sum(row[i] for row, i in zip(sizes, choice, strict=True))
        loss = sum(row[i] for row, i in zip(losses, choice, strict=True))
        if size <= capacity and (best is None or (loss, size) < best):
            best = loss, size
    return best


def totals(sizes, losses, chosen):
    return (
        sum(row[i] for row, i in zip(losses, chosen, strict=True)),
        sum(row[i] for row, i in zip(sizes, chosen, strict=True)),
    )


@pytest.mark.parametrize("seed", range(60))
def test_finds_what_trying_everything_finds(seed: int) -> None:
    rng = random.Random(seed)
    units = rng.randint(1, 6)
    # Losses that are no convex function of size, and not even monotone: greedy choices fail on them.
    sizes = [[rng.randint(0, 40) for _ in range(rng.randint(1, 5))] for _ in range(units)]
    losses = [[rng.choice([rng.random(), rng.randint(-2, 5)]) for _ in row] for row in sizes]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for capacity in {least, (least + most) // 2, rng.randint(least, most), most + 5}:
        expected_loss, _ = brute_force(sizes, losses, capacity)
        loss, size = totals(sizes, losses, solve(sizes, losses, capacity))
        assert size <= capacity
        assert loss == pytest.approx(expected_loss, abs=1e-9)


def test_greedy_is_not_enough() -> None:
    # By loss saved for each byte, unit 0's upgrade comes first and leaves no room for both of the others.
    sizes = [[0, 6], [0, 5], [0, 5]]
    losses = [[7.0, 0.0], [5.0, 0.0], [5.0, 0.0]]
    assert solve(sizes, losses, 10) == [0, 1, 1]


def test_the_least_loss_takes_no_more_room_than_it_needs() -> None:
    assert solve([[3, 5, 4]], [[2.0, 1.0, 1.0]], 100) == [2]


def test_a_large_model_is_solved_exactly_and_at_once() -> None:
    # 128 units of four kinds as in a 7B model, in units of their greatest common divisor.
    rng = random.Random(1)
    sizes, losses = [], []
    for unit in range(128):
        weights = (6144, 4096, 28672, 14336)[unit % 4]
        sensitivity = rng.lognormvariate(0, 2)
        sizes.append([weights * bits for bits in (3, 4, 6, 8, 16)])
        losses.append([sensitivity * 4.0**-bits * rng.uniform(0.8, 1.2) for bits in (3, 4, 6, 8)] + [0.0])
    capacity = sum(row[1] for row in sizes) * 17 // 16
    loss, size = totals(sizes, losses, solve(sizes, losses, capacity))
    assert size <= capacity
    # Integer linear programming, another exact method, agrees.
    optimize = pytest.importorskip("scipy.optimize")
    flat = [x for row in losses for x in row]
    one_each = [[float(j // 5 == unit) for j in range(640)] for unit in range(128)]
    scale = max(flat)
    found = optimize.milp(
        [x / scale for x in flat],
        integrality=[1] * 640,
        bounds=(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint([[x for row in sizes for x in row]], 0, capacity),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    assert loss == pytest.approx(found.fun * scale, rel=1e-6)


def test_nothing_fits() -> None:
    with pytest.raises(ParetoError, match="the smallest options need 9, and the capacity is 8"):
        solve([[4, 5], [5, 6]], [[1.0, 0.0], [1.0, 0.0]], 8)
