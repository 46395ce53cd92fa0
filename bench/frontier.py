"""The Pareto frontier: which configurations no other one beats."""

from __future__ import annotations

from collections.abc import Sequence


def non_dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each point whether it is on the frontier, both coordinates being better when smaller.

    A point is dominated when another is no worse in both coordinates and better in one. Equal points do not dominate
    each other.
    """
    result = []
    for x, y in points:
        beaten = any(a <= x and b <= y and (a < x or b < y) for a, b in points)
        result.append(not beaten)
    return result
