"""Plots of the report and of a study."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

from bench.report.rows import Ends, Frontier, stage_label
from loadtest.report.page_svg import BACKGROUND, FOREGROUND, GRID, MUTED, SERIES, style, svg
from loadtest.results.schema import Distribution, Summary

WIDTH = 5.6
MARKERS = "osD^vPX*"


def marker(number: int) -> str:
    """Return the marker of a line or point; where colours begin again, it is another one than the first time."""
    return MARKERS[(number + number // len(SERIES)) % len(MARKERS)]


def frontier_plot(frontier: Frontier) -> str:
    """Return the SVG of one trade-off: filled markers on the frontier, hollow ones off it."""
    figure, axes = _figure(3.6 + _legend_room(len(frontier.points)))
    order = {name: i for i, (name, _, _, _) in enumerate(frontier.points)}
    on = sorted(((x, y) for _, x, y, best in frontier.points if best), key=lambda p: p[0])
    axes.plot([x for x, _ in on], [y for _, y in on], color=MUTED, linewidth=1, linestyle="--", zorder=1)
    for name, x, y, best in frontier.points:
        colour = SERIES[order[name] % len(SERIES)]
        _bars(axes, x, y, frontier.bars.get(name), colour)
        axes.plot(
            x, y, marker(order[name]), color=colour, markersize=8, markeredgewidth=1.6,
            markerfacecolor=colour if best else BACKGROUND, zorder=3, label=name + ("" if best else " (dominated)"),
        )  # fmt: skip
    if not frontier.larger_y_is_better:
        _loss_axis(axes, [y for _, _, y, _ in frontier.points])
    axes.set_xlabel(f"{frontier.x_label} ({'more' if frontier.larger_x_is_better else 'less'} is better)")
    axes.set_ylabel(frontier.y_label)
    axes.margins(x=0.12)
    _legend(axes, len(frontier.points))
    return svg(figure, f"frontier-{frontier.key}")


def percentile_plot(title: str, unit: str, lines: Sequence[tuple[str, Distribution]]) -> str:
    """Return the SVG of latency percentiles: for each line a bar from P50 to P99 with marks at P50, P90, P95, P99.

    Args:
        title: what was measured.
        unit: of the numbers.
        lines: label and distribution.

    """
    figure, axes = _figure(0.9 + 0.34 * len(lines))
    styles = (("p50", "o", 0), ("p90", "|", 1), ("p95", "D", 2), ("p99", "x", 3))
    for row, (_, values) in enumerate(lines):
        axes.plot([values.p50, values.p99], [row, row], color=GRID, linewidth=5, solid_capstyle="round", zorder=1)
    for name, marker, series in styles:
        axes.plot(
            [getattr(values, name) for _, values in lines], range(len(lines)), marker, color=SERIES[series],
            markersize=7, markeredgewidth=1.8, label=name.upper(), zorder=3,
        )  # fmt: skip
    axes.set_yticks(range(len(lines)), [label for label, _ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{title}, {unit}")
    axes.grid(axis="y", visible=False)
    _legend(axes, 4, columns=4)
    return svg(figure, re.sub(r"\W+", "-", title.lower()))


def sweep_plot(tests: Sequence[tuple[str, Summary]]) -> str | None:
    """Return the SVG of throughput against P95 time to first token over the stages of each load test.

    None when no load test has at least two stages.
    """
    curves = []
    for name, test in tests:
        stages = [
            (stage, stage.throughput.output_tokens_per_s, stage.latency.ttft_ms.p95)
            for stage in test.stages
            if stage.throughput and stage.throughput.output_tokens_per_s is not None and stage.latency.ttft_ms
        ]
        if len(stages) > 1:
            curves.append((name, stages))
    if not curves:
        return None
    figure, axes = _figure(3.4)
    for i, (name, stages) in enumerate(curves):
        colour = SERIES[i % len(SERIES)]
        axes.plot(
            [x for _, x, _ in stages],
            [y for _, _, y in stages],
            color=colour,
            marker=marker(i),
            linewidth=1.6,
            label=name,
        )
        for stage, a, b in stages:
            offset, side = ((0, 7), "center") if i % 2 == 0 else ((0, -13), "center")
            axes.annotate(stage_label(stage), (a, b), xytext=offset, textcoords="offset points", color=MUTED,
                          fontsize=7, ha=side)  # fmt: skip
    axes.set_xlabel("output tokens per second (more is better)")
    axes.set_ylabel("P95 time to first token, ms")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1, y=0.2)
    _legend(axes, len(curves))
    return svg(figure, "sweep")


Place = tuple[float | str, float, float | None, float | None]
"""A point of a line: x, y, and the ends of y's interval."""


def line_plot(name: str, x_label: str, y_label: str, lines: Sequence[tuple[str, Sequence[Place]]]) -> str:
    """Return the SVG of lines with their intervals.

    Args:
        name: unique on the page.
        x_label: of the axis; its values are numbers, or words in their order.
        y_label: of the axis.
        lines: name and points of each, in the order of x.

    """
    figure, axes = _figure(3.4 + _legend_room(len(lines)))
    for i, (label, places) in enumerate(lines):
        colour = SERIES[i % len(SERIES)]
        for x, _, low, high in places:
            if low is not None and high is not None:
                axes.plot([x, x], [low, high], color=colour, linewidth=1.2, zorder=2)
        axes.plot(
            [x for x, *_ in places], [y for _, y, *_ in places], color=colour, marker=marker(i),
            linewidth=1.6, label=label, zorder=3,
        )  # fmt: skip
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.1, y=0.2)
    _legend(axes, len(lines))
    return svg(figure, name)


def _bars(axes: Any, x: float, y: float, ends: tuple[Ends, Ends] | None, colour: str) -> None:
    across, along = ends or (None, None)
    if across is not None:
        axes.plot(across, [y, y], color=colour, linewidth=1.2, zorder=2)
    if along is not None:
        axes.plot([x, x], along, color=colour, linewidth=1.2, zorder=2)


def _loss_axis(axes: Any, values: list[float]) -> None:
    """Show losses over orders of magnitude, with the baseline's 0 at the bottom."""
    positive = [v for v in values if v > 0]
    if positive and max(positive) > 8 * min(positive):
        axes.set_yscale("symlog", linthresh=min(positive))
    axes.set_ylim(bottom=-0.15 * (min(positive) if positive else 1))
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def _figure(height: float) -> tuple[Any, Any]:
    # The object-oriented interface needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    return figure, axes


def _legend_room(count: int) -> float:
    """Return the inches by which a figure is higher for more than six names above it, two in a row."""
    return 0.16 * max(0, (count + 1) // 2 - 3)


def _legend(axes: Any, count: int, columns: int = 2) -> None:
    if count:
        axes.figure.legend(
            loc="outside upper left", ncols=columns, frameon=False, fontsize=8, labelcolor=FOREGROUND, numpoints=1,
            handletextpad=0.3, columnspacing=1.2,
        )  # fmt: skip
