"""What the user sees: progress while the load runs, and the table of results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

import gevent
from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from loadtest.load.sink import Sink
from loadtest.load.stage import Stage, StageSpec
from loadtest.results.schema import Distribution, StageResult, Summary

# Drawing shares the core with the requests being timed, so it happens rarely.
_REDRAW_S = 0.5
# Without a terminal a log gets a line this often, so that a hang is seen.
_LINE_S = 10.0


class Progress:
    """A progress bar on standard error, for the present stage; a line every 10 seconds where that is no terminal.

    Args:
        stages: all of them, for the count.
        sink: knows the requests in flight and finished.
        enabled: ``--progress``.

    """

    def __init__(self, stages: Sequence[StageSpec], sink: Sink, enabled: bool) -> None:
        self._count = len(stages)
        self._sink = sink
        self._stage: Stage | None = None
        self._enabled = enabled
        self._greenlet: gevent.Greenlet | None = None
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[counts]}", markup=False),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr, markup=False, emoji=False),
            auto_refresh=False,
            transient=True,
            disable=not enabled or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=1.0, counts="")

    def __enter__(self) -> Progress:
        self._bar.start()
        self._greenlet = gevent.spawn(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._greenlet is not None:
            self._greenlet.kill()
        self._bar.stop()

    def show(self, stage: Stage) -> None:
        """Turn to another stage."""
        self._stage = stage
        self._draw()

    def _run(self) -> None:
        while True:
            gevent.sleep(_LINE_S if self._bar.disable else _REDRAW_S)
            if self._bar.disable and self._enabled:
                self._print_line()
            self._draw()

    def _print_line(self) -> None:
        if self._stage is not None:
            description, counts = self._words(self._stage)
            print(f"{description}: {self._stage.progress():.0%}, {counts}", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        stage = self._stage
        if stage is None or self._bar.disable:
            return
        description, counts = self._words(stage)
        self._bar.update(
            self._task,
            description=description,
            completed=stage.progress(),
            counts=counts,
        )
        self._bar.refresh()

    def _words(self, stage: Stage) -> tuple[str, str]:
        sink = self._sink
        phase = "warm-up" if stage.measured_from is None else load_name(stage.spec)
        counts = f"{sink.ok} ok, {sink.failed} failed, {sink.in_flight} in flight"
        return f"stage {stage.spec.index + 1}/{self._count}: {phase}", counts


def load_name(stage: StageSpec | StageResult) -> str:
    """Return a stage's load in words: ``4 users`` or ``10/s poisson``."""
    if stage.rate is None:
        return f"{stage.concurrency} user{'' if stage.concurrency == 1 else 's'}"
    return f"{stage.rate:g}/s {stage.arrival}"


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print throughput and latencies of all stages, then failures by class and what to know about the numbers."""
    console = console or Console(markup=False, emoji=False)
    console.print(f"{summary.label}: {summary.server.model} at {summary.server.base_url}", markup=False)
    for table in (_throughput_table(summary.stages), _latency_table(summary.stages)):
        # On a narrow terminal a line that wraps is better than a number that loses its digits.
        natural = Measurement.get(console, console.options.update(max_width=1000), table).maximum
        console.width = max(console.width, natural)
        console.print(table)
    for stage in summary.stages:
        name = load_name(stage)
        for kind, count in stage.failures.items():
            example = stage.failure_examples.get(kind, "")
            console.print(f"{name}: {count} failed as {kind}, for example: {example}", highlight=False)
        for note in stage.notes:
            console.print(f"{name}: note: {note}", highlight=False)
    lag = summary.generator.loop_lag_ms
    if lag is not None and lag.p99 > 10:
        console.print(
            f"note: the load generator itself ran late (P99 {lag.p99:.0f} ms, {summary.generator.cpu_percent:.0f}% CPU)"
            ", and latencies include that; use fewer users, or Locust's distributed workers",
            markup=False,
        )


def _throughput_table(stages: Sequence[StageResult]) -> Table:
    table = Table(box=SIMPLE)
    table.add_column("load", no_wrap=True)
    for heading in ("ok", "failed", "seconds", "req/s", "out tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    with_goodput = any(stage.goodput for stage in stages)
    if with_goodput:
        table.add_column("good/s", justify="right", no_wrap=True)
        table.add_column("good", justify="right", no_wrap=True)
    for stage in stages:
        rates, good = stage.throughput, stage.goodput
        cells = [load_name(stage), str(stage.requests.ok), str(stage.requests.failed)]
        if rates:
            cells += [f"{rates.window_s:.1f}", f"{rates.requests_per_s:.2f}"]
            cells.append(f"{rates.output_tokens_per_s:.1f}")
        else:
            cells += ["-"] * 3
        if with_goodput:
            cells += [f"{good.requests_per_s:.2f}", f"{good.fraction:.0%}"] if good else ["-", "-"]
        table.add_row(*cells)
    return table


def _latency_table(stages: Sequence[StageResult]) -> Table:
    table = Table(box=SIMPLE)
    table.add_column("load", no_wrap=True)
    table.add_column("ms", no_wrap=True)
    for heading in ("mean", "P50", "P90", "P95", "P99", "max"):
        table.add_column(heading, justify="right")
    for stage in stages:
        latency = stage.latency
        rows = (
            ("TTFT", latency.ttft_ms),
            ("TPOT", latency.tpot_ms),
            ("ITL", latency.itl_ms),
            ("end to end", latency.e2e_ms),
        )
        for number, (name, values) in enumerate(rows):
            table.add_row(
                "" if number else load_name(stage), name, *_cells(values), end_section=number == len(rows) - 1
            )
    return table


def _cells(values: Distribution | None) -> list[str]:
    if values is None:
        return ["-"] * 6
    # Four digits need no decimal, and six columns of them must fit into 80 characters.
    return [
        f"{v:.1f}" if v < 1000 else f"{v:.0f}"
        for v in (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
    ]
