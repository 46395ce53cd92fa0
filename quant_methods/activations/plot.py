"""Draws activation statistics: ranges, outlier channels and what int8 rounds to zero of every stage, before, after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quant_methods.activations.input_statistics import Criteria, InputStatistics
from quant_methods.plots import COLOURS, label_places, png, short_name

BEFORE, AFTER = COLOURS[0], COLOURS[3]


def plot(before: list[InputStatistics], after: list[InputStatistics] | None, criteria: Criteria, title: str) -> bytes:
    """Return a PNG of three panels over the stages in model order."""
    # The object-oriented interface needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(6 + 0.2 * len(before), 16), 8.2), layout="constrained", dpi=130)
    ranges, counts, zeros = figure.subplots(3, 1, sharex=True)
    sides = [("before" if after else "inputs", BEFORE, before), *([("after", AFTER, after)] if after else [])]
    for name, colour, rows in sides:
        _line(ranges, rows, lambda row: row.largest, colour, "o-", f"{name}: largest |x|")
        _line(ranges, rows, lambda row: row.median_largest, colour, "v:", f"{name}: median channel's largest")
        _line(counts, rows, lambda row: row.outlier_channels, colour, "o-", f"{name}: > {criteria.factor:g} x median")
        _line(counts, rows, lambda row: row.llm_int8_channels, colour, "v:", f"{name}: |x| >= 6 (LLM.int8)")
        _line(zeros, rows, lambda row: 100 * row.static_zeros, colour, "o-", f"{name}: one static scale")
        _line(zeros, rows, lambda row: 100 * row.token_zeros, colour, "v:", f"{name}: one scale a token")
    ranges.set_ylabel("size of inputs")
    ranges.set_yscale("log")
    ranges.set_title(title, fontsize=10)
    counts.set_ylabel("outlier channels")
    counts.set_yscale("symlog", linthresh=1)
    most = max(max(row.outlier_channels, row.llm_int8_channels) for _, _, rows in sides for row in rows)
    counts.set_ylim(-0.15, 2 * max(most, 1))
    zeros.set_ylabel("int8 rounds to zero, %")
    zeros.set_ylim(bottom=0)
    places, names = label_places([short_name(row.name) for row in before])
    zeros.set_xticks(places, names, rotation=90 if len(places) == len(before) else 0, fontsize=8)
    for axes in (ranges, counts, zeros):
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlim(-0.8, len(before) - 0.2)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return png(figure)


def _line(
    axes: Any,
    rows: list[InputStatistics],
    value: Callable[[InputStatistics], float],
    colour: str,
    style: str,
    label: str,
) -> None:
    values = [value(row) for row in rows]
    hollow = "white" if style.startswith("v") else colour
    axes.plot(values, style, color=colour, markersize=4, linewidth=1, markerfacecolor=hollow, label=label)
