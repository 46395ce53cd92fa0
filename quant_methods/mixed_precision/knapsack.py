"""Chooses one option of each unit so that the sizes fit a capacity and the losses add up to the least: exactly.

This is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger: "Knapsack Problems", 2004, chapter 11),
solved by dynamic programming over the sizes that partial choices can have. After each unit only those partial choices
are kept that no other beats in both size and loss (dominance, section 11.2), and of these only the ones that a lower
bound on what the rest must cost does not rule out: for any multiplier m >= 0 the remaining units cost at least
``sum_i min_j(loss_ij + m size_ij) - m (capacity left)`` (Lagrangian relaxation, section 11.3). Neither discards every
best choice, so the result is optimal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kv_cache.errors import ParetoError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def solve(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """Return which option of each unit to take.

    Args:
        sizes: for each unit the size of each option, not negative.
        losses: for each unit the loss of each option, finite.
        capacity: what the chosen sizes may add up to.

    Returns:
        Indices of options whose losses add up to the least (up to float64's rounding), and of those the smallest.

    Raises:
        ParetoError: even the smallest options do not fit.

    """
    size = [np.asarray(row, dtype=np.int64) for row in sizes]
    loss = [np.asarray(row, dtype=np.float64) for row in losses]
    least = sum(int(row.min()) for row in size)
    if least > capacity:
        raise ParetoError(f"the smallest options need {least:,}, and the capacity is {capacity:,}")
    multiplier, upper = _relax(size, loss, capacity)
    # What the units from i on must cost at least, plus `multiplier` times their size; and their smallest size.
    costs = [float((row + multiplier * width).min()) for width, row in zip(size, loss, strict=True)]
    rest = np.concatenate([np.cumsum(costs[::-1])[::-1], [0.0]])
    room = np.concatenate([np.cumsum([int(row.min()) for row in size][::-1])[::-1], [0]]).astype(np.int64)
    # Rounding must not rule out the best choice itself.
    slack = 1e-9 * (1 + abs(upper))

    total_size, total_loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    origins: list[tuple[Integers, Integers]] = []  # of each kept state: the state before, and the option taken
    for index, (widths, row) in enumerate(zip(size, loss, strict=True)):
        candidates = (total_size[:, None] + widths).ravel()
        costs_so_far = (total_loss[:, None] + row).ravel()
        bound = costs_so_far + rest[index + 1] - multiplier * (capacity - candidates)
        possible = np.flatnonzero((candidates + room[index + 1] <= capacity) & (bound <= upper + slack))
        kept = possible[_undominated(candidates[possible], costs_so_far[possible])]
        total_size, total_loss = candidates[kept], costs_so_far[kept]
        origins.append((kept // len(widths), kept % len(widths)))
    # Undominated states rise in size and fall in loss, so the last is the best.
    state = len(total_size) - 1
    chosen = []
    for before, option in reversed(origins):
        chosen.append(int(option[state]))
        state = int(before[state])
    return chosen[::-1]


def _undominated(size: Integers, loss: Floats) -> Integers:
    """Return the indices of the states that no state of at most their size matches in loss, by rising size."""
    order = np.lexsort((loss, size))
    sorted_loss = loss[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_loss)[:-1]])
    return order[sorted_loss < best_before]


def _relax(size: list[Integers], loss: list[Floats], capacity: int) -> tuple[float, float]:
    """Return a good multiplier of the Lagrangian relaxation, and the loss of a choice that fits."""

    def taken(multiplier: float) -> tuple[int, float]:
        picks = [int((row + multiplier * widths).argmin()) for widths, row in zip(size, loss, strict=True)]
        return (
            sum(int(widths[pick]) for widths, pick in zip(size, picks, strict=True)),
            sum(float(row[pick]) for row, pick in zip(loss, picks, strict=True)),
        )

    smallest = [np.lexsort((row, widths))[0] for widths, row in zip(size, loss, strict=True)]
    upper = sum(float(row[pick]) for row, pick in zip(loss, smallest, strict=True))
    low, high = 0.0, 1.0
    width, cost = taken(low)
    if width <= capacity:
        return 0.0, min(upper, cost)
    for _ in range(200):  # Doubles until the choice fits, at most to 2^200 of a unit of loss a unit of size.
        width, cost = taken(high)
        if width <= capacity:
            upper = min(upper, cost)
            break
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        width, cost = taken(middle)
        if width <= capacity:
            high, upper = middle, min(upper, cost)
        else:
            low = middle
    return high, upper
