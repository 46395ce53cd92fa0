"""Plots of a load test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from loadtest.report.page_svg import FOREGROUND, MUTED, SERIES, style, svg
from loadtest.report.series import Panel
from loadtest.statistics.samples import Floats

_DASHES = ("-", "--", ":", "-.")
_POINTS = 150


def timeline(panels: Sequence[Panel], stages: Sequence[tuple[float, str]], name: str) -> str:
    """Return panels above each other on one time axis; ``stages`` are begins in seconds, with their names."""
    figure = Figure(figsize=(9.0, 0.5 + 1.25 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        style(axes)
        for number, line in enumerate(panel.lines):
            axes.plot(line.x, line.y, color=SERIES[number], linewidth=1.3, label=line.name, drawstyle=line.style)
        for begin, _ in stages:
            axes.axvline(begin, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0, top=panel.top)
        axes.set_ylabel(panel.title)
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, labelcolor=FOREGROUND,
            handlelength=1.2,
        )  # fmt: skip
    for begin, text in stages:
        rows[0].annotate(
            text, (begin, 1.02), xycoords=("data", "axes fraction"), fontsize=8, color=MUTED, ha="left", va="bottom"
        )
    rows[-1].set_xlabel("seconds")
    return svg(figure, name)


def distributions(curves: Sequence[tuple[str, Floats]], title: str, name: str) -> str:
    """Return how many of the values are at most x, a line for each of ``curves``, up to their P99.9."""
    figure, axes = _one(2.9)
    levels = np.unique(np.concatenate([np.linspace(0, 0.9, _POINTS // 2), 1 - np.geomspace(0.1, 0.001, _POINTS // 2)]))
    for number, (label, values) in enumerate(curves):
        axes.plot(
            np.quantile(values, levels), 100 * levels, color=SERIES[number % len(SERIES)], linewidth=1.5, label=label,
            linestyle=_DASHES[number // len(SERIES) % len(_DASHES)],
        )  # fmt: skip
    for level in (50, 95):
        axes.axhline(level, color=MUTED, linewidth=0.7, linestyle=":")
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 25, 50, 75, 95])
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{title}, ms")
    axes.set_ylabel("% of values at most")
    axes.legend(loc="lower right", frameon=False, fontsize=8, labelcolor=FOREGROUND)
    return svg(figure, name)


def over_load(
    x: Sequence[float], lines: Sequence[tuple[str, Sequence[float]]], labels: tuple[str, str], name: str,
    equal: bool = False,
) -> str:  # fmt: skip
    """Return lines over the load of the stages; ``equal`` adds where y would be x."""
    figure, axes = _one(2.9)
    order = np.argsort(x)
    if equal:
        most = max(x)
        axes.plot([0, most], [0, most], color=MUTED, linewidth=0.9, linestyle=":", label="all that was offered")
    for number, (label, y) in enumerate(lines):
        axes.plot(np.asarray(x)[order], np.asarray(y)[order], "o-", color=SERIES[number], label=label, linewidth=1.5)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(frameon=False, fontsize=8, labelcolor=FOREGROUND)
    return svg(figure, name)


def _one(height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    return figure, axes
