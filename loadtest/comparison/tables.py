"""Comparisons and verdicts on the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from loadtest.comparison.compare import FAILED, Comparison, Row, Verdict, shown, shown_change


def direction(row: Row) -> str:
    """Return ``worse`` or ``better`` where the interval of the change leaves no doubt, else nothing."""
    low, high = row.change.low, row.change.high
    if low is not None and low > 0:
        return "worse" if row.figure.more_is_worse else "better"
    if high is not None and high < 0:
        return "better" if row.figure.more_is_worse else "worse"
    return ""


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print every figure of both sides, its change, and what to know about it."""
    console = console or Console(markup=False, emoji=False)
    a, b = comparison.a, comparison.b
    for letter, side in (("A", a), ("B", b)):
        runs = f"{len(side.runs)} runs" if len(side.runs) > 1 else "1 run"
        console.print(f"{letter}: {side.label}, {side.path}, {runs}", highlight=False)
    table = Table(box=SIMPLE)
    for heading in ("load", "figure"):
        table.add_column(heading, no_wrap=True)
    for heading in ("A", "B", "change", "95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    load = ""
    for row in comparison.rows:
        change, figure = row.change, row.figure
        table.add_row(
            row.load if row.load != load else "", figure.name, shown(change.a, figure), shown(change.b, figure),
            shown_change(change.change, figure),
            f"{shown_change(change.low, figure)} to {shown_change(change.high, figure)}", direction(row),
        )  # fmt: skip
        load = row.load
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum)
    console.print(table)
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False)


def print_verdicts(verdicts: Sequence[Verdict], console: Console | None = None) -> None:
    """Print what became of each condition, a line each; those that failed are for the caller to report as errors."""
    console = console or Console(markup=False, emoji=False)
    for verdict in verdicts:
        if verdict.outcome != FAILED:
            console.print(
                f"{verdict.outcome}: {verdict.load}: {verdict.condition.text}: {verdict.message}", highlight=False,
                soft_wrap=True,
            )  # fmt: skip
