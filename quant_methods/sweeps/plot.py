"""Draws a sweep: KL divergence against bits a weight, one mark a point, numbered as in the table."""

from __future__ import annotations

import math
from typing import Any

from quant_methods.plots import COLOURS, MARKERS, png

NEAR = 0.024, 0.02
"""Marks that are nearer than these shares of the plot's width and height share one place for their numbers."""
ROOM = 0.2
"""Share of the plot's width that numbers left of a mark may need."""


def frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that no other has at most the bits and less KL of, by rising bits."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["bits_per_weight"], row["kl"])):
        if not best or row["kl"] < best[-1]["kl"]:
            best.append(row)
    return best


def plot(rows: list[dict[str, Any]], title: str) -> bytes:
    """Return a PNG."""
    # The object-oriented interface needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    families = list(dict.fromkeys(family(row) for row in rows))
    edge = frontier(rows)
    axes.plot(
        [row["bits_per_weight"] for row in edge], [_shown(row) for row in edge], color="#888888", linewidth=1,
        linestyle="--", zorder=1, label="best for its bits",
    )  # fmt: skip
    for place, name in enumerate(families):
        own = [row for row in rows if family(row) == name]
        axes.plot(
            [row["bits_per_weight"] for row in own], [_shown(row) for row in own], MARKERS[place % len(MARKERS)],
            color=COLOURS[(place + place // len(MARKERS)) % len(COLOURS)], markersize=7, label=name, zorder=2,
        )  # fmt: skip
    for numbers, at, where in labels(rows):
        axes.annotate(
            ", ".join(map(str, numbers)), at, xytext=(7 * where, 4 if where > 0 else -3), textcoords="offset points",
            fontsize=8, ha="left" if where > 0 else "right",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, everything included")
    axes.set_ylabel("KL divergence to the original, nats a token")
    axes.set_title(f"{title} (numbers: rows of the table)", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.7, which="both")
    axes.set_axisbelow(True)
    axes.margins(0.08)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)


def family(row: dict[str, Any]) -> str:
    """Return the methods of a row's recipe, and the bits of its activations where they are rounded."""
    steps = row["recipe"]["steps"]
    names = list(dict.fromkeys(step["method"] for step in steps))
    extras = []
    if any(step.get("outliers") for step in steps):
        extras.append("outliers apart")
    if any(step.get("rank") for step in steps):
        extras.append("low rank")
    if rounded := {step["activations"].removeprefix("int") for step in steps if "int" in step.get("activations", "")}:
        extras.append(f"A{'/'.join(sorted(rounded))}")
    if any("budget" in str(key) for key in row["settings"]):
        extras.append("mixed bits")
    return ", ".join([" + ".join(names), *extras])


def labels(rows: list[dict[str, Any]]) -> list[tuple[list[int], tuple[float, float], int]]:
    """Return where to write which numbers: those of marks close together in one place.

    Returns:
        Rows' numbers from 1, the point (bits, KL) that they belong to, and the side of it: 1 right, -1 left, where
        other marks are on the right.

    """
    Mark = tuple[float, float]
    found: list[tuple[list[int], list[Mark]]] = []
    marks = [(row["bits_per_weight"], math.log10(_shown(row))) for row in rows]
    width, height = (max(max(axis) - min(axis), 1e-9) for axis in zip(*marks, strict=True))
    left = min(marks)[0]

    def near(one: Mark, other: Mark, wide: float = 1, high: float = 1) -> bool:
        across, up = abs(one[0] - other[0]) / width, abs(one[1] - other[1]) / height
        return across < wide * NEAR[0] and up < high * NEAR[1]

    for i in sorted(range(len(rows)), key=lambda i: -marks[i][1]):
        for numbers, own in found:
            if any(near(marks[i], mark) for mark in own):
                numbers.append(i + 1)
                own.append(marks[i])
                break
        else:
            found.append(([i + 1], [marks[i]]))
    placed = []
    for numbers, own in found:
        last = max(own)
        crowded = any(mark > last and mark not in own and near(mark, last, 4, 2) for mark in marks)
        crowded = crowded and min(own)[0] - left > ROOM * width
        at = min(own) if crowded else last
        placed.append((sorted(numbers), (at[0], 10 ** at[1]), -1 if crowded else 1))
    return placed


def _shown(row: dict[str, Any]) -> float:
    return max(row["kl"], 1e-7)  # A logarithmic axis has no zero.
