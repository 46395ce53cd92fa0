"""Figures of repeated runs, with intervals of what differs between runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from scipy import stats

from loadtest.comparison.compare import shown
from loadtest.comparison.side import Run, Side
from loadtest.results.console import load_name
from loadtest.results.schema import Interval
from loadtest.statistics.batches import CONFIDENCE, value
from loadtest.statistics.figures import STANDARD, parse_figure

SCHEMA = "vllm-pareto/loadtest-repeats/1"
STOP_BY = ("p95_ttft", "p95_e2e")
"""The figures whose interval ``--until-ci`` is about."""
_SHOWN = ("p50_ttft", "p95_ttft", "p95_tpot", "p95_e2e", "requests_per_s", "output_tokens_per_s", "goodput")


@dataclass(frozen=True)
class RepeatedStage:
    """One load over several runs: the mean of each figure with Student's interval, and the figure of each run."""

    load: str
    figures: dict[str, Interval]
    runs: dict[str, list[float]]


def repeated_stages(side: Side) -> list[RepeatedStage]:
    """Return the figures of every stage that all runs have."""
    stages = []
    for stage in side.stages:
        samples = [run.samples[stage.index] for run in side.runs]
        figures, runs = {}, {}
        for name in STANDARD:
            figure = parse_figure(name)
            if all(figure.applies(each) for each in samples):
                runs[name] = [value(each, figure) for each in samples]
                figures[name] = student(runs[name], 1.0 if figure.kind == "fraction" else math.inf)
        stages.append(RepeatedStage(load_name(stage), figures, runs))
    return stages


def student(values: Sequence[float], most: float = math.inf) -> Interval:
    """Return the mean of independent values, 0 to ``most`` each, with its 95% interval; no bounds for a single one."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, max(mean - reach, 0.0), min(mean + reach, most))


def widest(stages: Sequence[RepeatedStage]) -> float:
    """Return the greatest half-width of an interval of ``STOP_BY``, as a fraction of its figure."""
    widths = [_width(stage.figures[name]) for stage in stages for name in STOP_BY if name in stage.figures]
    return max(widths, default=math.inf)


def _width(found: Interval) -> float:
    if found.high is None or found.low is None or not found.value:
        return math.inf
    return (found.high - found.low) / 2 / found.value


def to_document(runs: Sequence[Run], stages: Sequence[RepeatedStage]) -> dict[str, Any]:
    """Return the JSON document."""
    return {"schema": SCHEMA, "runs": [run.path.name for run in runs], "stages": [asdict(stage) for stage in stages]}


def print_repeats(stages: Sequence[RepeatedStage], width: float | None, console: Console | None = None) -> None:
    """Print the figures over all runs, and whether ``--until-ci`` was reached."""
    console = console or Console(markup=False, emoji=False)
    table = Table(box=SIMPLE)
    for heading in ("load", "figure"):
        table.add_column(heading, no_wrap=True)
    for heading in ("mean of runs", "95% interval", "±"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in stages:
        names = [name for name in _SHOWN if name in stage.figures]
        for number, name in enumerate(names):
            found, figure = stage.figures[name], parse_figure(name)
            assert found.low is not None
            assert found.high is not None
            relative = f"{_width(found):.1%}" if found.value else "-"
            table.add_row(
                "" if number else stage.load, name, shown(found.value, figure),
                f"{shown(found.low, figure)} to {shown(found.high, figure)}", relative,
            )  # fmt: skip
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum)
    console.print(table)
    if width is not None:
        reached = widest(stages)
        said = "reached" if reached <= width else "not reached; make the runs longer or allow more of them"
        console.print(
            f"--until-ci {100 * width:g}%: the widest interval of {' and '.join(STOP_BY)} is ±{reached:.1%}: {said}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
