"""The table of configurations, from the list of metrics: for the page, and for the console."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.report.figures import NONE
from bench.report.metrics import METRICS, Metric
from bench.report.rows import Row


@dataclass(frozen=True)
class Cell:
    """A cell: its text, what stands below it in small letters, and of that the extremes over repeats."""

    text: str
    sub: str = ""
    best: bool = False
    extremes: str = ""


DASH = Cell(NONE)


def columns(metrics: Iterable[Metric] | None = None) -> list[tuple[str, list[Metric]]]:
    """Return headings, each with its metrics; of all metrics unless given some."""
    shown = [metric for metric in (METRICS if metrics is None else metrics) if metric.column]
    return [(heading, list(group)) for heading, group in itertools.groupby(shown, lambda metric: metric.column)]


def cells(row: Row, grouped: Sequence[tuple[str, list[Metric]]]) -> list[Cell]:
    """Return a row's cells."""
    return [_cell(row, metrics) for _, metrics in grouped]


def _cell(row: Row, metrics: list[Metric]) -> Cell:
    first = metrics[0]
    if row.is_baseline and first.of_baseline is not None:
        return Cell(f"{first.of_baseline:g}", "reference")
    found = [row.figures.get(metric.key) for metric in metrics]
    if any(figure is None for figure in found):
        return DASH
    figures = [(metric, figure) for metric, figure in zip(metrics, found, strict=True) if figure is not None]
    under = figures[0][1].below(first.show)
    if (first.load or first.served) and not under:
        under = f"at {row.load}" if row.load else ""
    extremes = " / ".join(
        f"{metric.show(figure.low)} to {metric.show(figure.high)}"
        for metric, figure in figures
        if metric.served and not figure.note and figure.low is not None and figure.high is not None
    )
    under = ", ".join(part for part in (extremes, under) if part)
    return Cell(" / ".join(metric.show(figure.value) for metric, figure in figures), under, extremes=extremes)


def console(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of text."""
    grouped = columns(metric for metric in METRICS if metric.console)
    made = []
    for row in rows:
        made.append([row.name, *map(_console_text, cells(row, grouped))])
    return ["configuration", *(heading for heading, _ in grouped)], made


def _console_text(cell: Cell) -> str:
    if cell.extremes:
        return f"{cell.text}\n{cell.extremes}"
    return f"{cell.text} (reference)" if cell.sub == "reference" else cell.text
