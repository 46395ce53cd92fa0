"""Every figure as CSV, one a line."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

from loadtest.comparison.compare import Comparison
from loadtest.comparison.side import Side
from loadtest.results.console import load_name
from loadtest.results.schema import Interval, StageResult
from loadtest.statistics.figures import parse_figure

_RUN = ("run", "label", "stage", "load", "part", "figure", "unit", "value", "low", "high")
_COMPARISON = ("load", "figure", "unit", "a", "b", "change", "low", "high", "compared")


def csv_text(side: Side | None, comparison: Comparison | None) -> str:
    """Return the figures of a run (or of each of its repeats) or of a comparison; an undefined number is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if comparison is not None:
        writer.writerow(_COMPARISON)
        for row in comparison.rows:
            change = row.change
            numbers = (change.a, change.b, change.change, change.low, change.high)
            writer.writerow([row.load, row.figure.name, row.figure.unit, *map(_text, numbers), change.unit])
    elif side is not None:
        writer.writerow(_RUN)
        for run in side.runs:
            for stage in run.summary.stages:
                for line in _lines(stage):
                    writer.writerow([run.path, run.summary.label, stage.index, load_name(stage), *line])
    return out.getvalue()


def _lines(stage: StageResult) -> list[list[str]]:
    parts: list[tuple[str, dict[str, Interval]]] = [("all", stage.intervals)]
    if stage.steady is not None:
        parts.append(("steady", stage.steady.figures))
    energy = asdict(stage.energy) if stage.energy else {}
    return [
        *(
            [part, name, parse_figure(name).unit, _text(found.value), _text(found.low), _text(found.high)]
            for part, figures in parts
            for name, found in figures.items()
        ),
        *(["all", name, "W" if "watts" in name else "J", _text(value), "", ""] for name, value in energy.items()),
    ]


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"
