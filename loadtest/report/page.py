"""The page: one file of HTML without any outside resource."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader

from loadtest.comparison.compare import Comparison, Verdict, shown, shown_change
from loadtest.comparison.repeats import repeated_stages
from loadtest.comparison.side import Run, Side
from loadtest.comparison.tables import direction
from loadtest.report import plots
from loadtest.report.series import panels
from loadtest.results.console import load_name
from loadtest.results.schema import Interval
from loadtest.statistics.figures import parse_figure
from loadtest.statistics.samples import Floats

_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between chunks",
    "e2e": "end to end",
}
_FIGURES = (
    "p50_ttft", "p95_ttft", "p99_ttft", "p50_tpot", "p95_tpot", "p95_itl", "p50_e2e", "p95_e2e", "requests_per_s",
    "output_tokens_per_s", "goodput", "error_rate",
)  # fmt: skip


def render(side: Side | None, comparison: Comparison | None, verdicts: Sequence[Verdict]) -> str:
    """Return the HTML of a run, of repeated ones, or of a comparison.

    Args:
        side: the run or runs; None with a comparison.
        comparison: None with a side.
        verdicts: what became of the conditions.

    """
    sides = [comparison.a, comparison.b] if comparison else [side] if side else []
    title = " against ".join(each.label for each in sides)
    environment = Environment(autoescape=True, trim_blocks=True, loader=PackageLoader("loadtest.report"))
    return environment.get_template("page.html.j2").render(
        title=title,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sides=[(each, each.runs[0].summary) for each in sides],
        verdicts=verdicts,
        changes=_changes(comparison) if comparison else None,
        notes=_notes(sides, comparison),
        headings=["load", *(name for name in _FIGURES if any(name in f for _, f in _figures(sides)))],
        rows=_rows(sides),
        timelines=[(run.path, _timeline(run, i)) for i, each in enumerate(sides) for run in each.runs[:1]],
        loads=[plot for i, each in enumerate(sides) for plot in _over_load(each, i)],
        distributions=_distributions(sides),
        failures=[
            (each.label, load_name(stage), kind, count, stage.failure_examples.get(kind, ""))
            for each in sides
            for stage in each.stages
            for kind, count in stage.failures.items()
        ],
    )


def _figures(sides: Sequence[Side]) -> list[tuple[str, dict[str, Interval]]]:
    """Return the figures of each stage, over the runs where there are several."""
    found = []
    for side in sides:
        label = f"{side.label}: " if len(sides) > 1 else ""
        if len(side.runs) > 1:
            found += [(label + stage.load, stage.figures) for stage in repeated_stages(side)]
        else:
            found += [(label + load_name(stage), stage.intervals) for stage in side.stages]
    return found


def _rows(sides: Sequence[Side]) -> list[tuple[str, list[tuple[str, str]]]]:
    figures = _figures(sides)
    used = [name for name in _FIGURES if any(name in found for _, found in figures)]
    return [(load, [_cell(found.get(name), name) for name in used]) for load, found in figures]


def _cell(found: Interval | None, name: str) -> tuple[str, str]:
    if found is None:
        return "-", ""
    figure = parse_figure(name)
    low, high = ("?" if bound is None else shown(bound, figure) for bound in (found.low, found.high))
    return shown(found.value, figure), f"{low} to {high}"


def _changes(comparison: Comparison) -> list[dict[str, str]]:
    return [
        {
            "load": row.load,
            "figure": row.figure.name,
            "a": shown(row.change.a, row.figure),
            "b": shown(row.change.b, row.figure),
            "change": shown_change(row.change.change, row.figure),
            "interval": f"{shown_change(row.change.low, row.figure)} to {shown_change(row.change.high, row.figure)}",
            "verdict": direction(row),
        }
        for row in comparison.rows
    ]


def _notes(sides: Sequence[Side], comparison: Comparison | None) -> list[str]:
    notes = list(comparison.notes) if comparison else []
    for side in sides:
        for stage in side.stages:
            notes += [f"{side.label}, {load_name(stage)}: {note}" for note in stage.notes]
    return notes


def _timeline(run: Run, number: int) -> str:
    found, begins = panels(run)
    names = {str(stage.index): load_name(stage) for stage in run.summary.stages}
    return plots.timeline(found, [(begin, names[index]) for begin, index in begins], f"time-{number}") if found else ""


def _distributions(sides: Sequence[Side]) -> list[str]:
    found = []
    for name, title in _TITLES.items():
        curves: list[tuple[str, Floats]] = []
        for side in sides:
            for stage in side.stages:
                values = side.runs[0].samples[stage.index].quantities[name].values
                if len(values):
                    curves.append(((f"{side.label}: " if len(sides) > 1 else "") + load_name(stage), values))
        if curves:
            found.append(plots.distributions(curves, title, name))
    return found


def _over_load(side: Side, number: int) -> list[str]:
    """Return the plots over load of a side with several stages."""
    stages = [stage for stage in side.stages if stage.throughput and stage.latency.ttft_ms]
    if len(stages) < 2:
        return []
    is_open = all(stage.rate is not None for stage in stages)
    # What was offered in fact: of few Poisson arrivals it is not quite the rate that was asked for.
    x = [
        stage.throughput.offered_requests_per_s if is_open and stage.throughput else float(stage.concurrency or 0)
        for stage in stages
    ]
    axis = f"{side.label}: " + ("requests offered a second" if is_open else "users")
    rates = [stage.throughput.requests_per_s for stage in stages if stage.throughput]
    shares: list[tuple[str, list[float]]] = [
        ("failed", [100 * stage.intervals["error_rate"].value for stage in stages])
    ]
    if all(stage.goodput for stage in stages):
        shares.append(("good", [100 * stage.goodput.fraction for stage in stages if stage.goodput]))
    latencies: list[tuple[str, list[float]]] = [
        (p.upper(), [getattr(stage.latency.ttft_ms, p) for stage in stages]) for p in ("p50", "p95")
    ]
    plotted: list[Any] = [
        plots.over_load(x, [("answered", rates)], (axis, "requests a second"), f"rate-{number}", equal=is_open),
        plots.over_load(x, latencies, (axis, "TTFT, ms"), f"latency-{number}"),
        plots.over_load(x, shares, (axis, "% of requests"), f"share-{number}"),
    ]
    return plotted
