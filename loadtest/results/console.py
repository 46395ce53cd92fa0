"""The table of results, as the user sees it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from loadtest.results.schema import Distribution, SearchResult, StageResult, Summary
from loadtest.stage_spec import HOLD, TRACE, StageSpec


def load_name(stage: StageSpec | StageResult) -> str:
    """Return a stage's load in words: ``4 users``, ``10/s poisson``, or the shape as its flag says it."""
    if stage.shape == TRACE:
        return "trace" if stage.rate is None else f"trace, {stage.rate:g}/s"
    if stage.shape != HOLD:
        return f"{stage.shape} {stage.profile}"
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
    if summary.search is not None:
        console.print(search_line(summary.search), highlight=False)
    lag = summary.generator.loop_lag_ms
    if lag is not None and lag.p99 > 10:
        console.print(
            f"note: the load generator itself ran late (P99 {lag.p99:.0f} ms, {summary.generator.cpu_percent or 0:.0f}"
            "% CPU), and latencies include that; use fewer users, or more --processes",
            markup=False,
        )


def search_line(found: SearchResult) -> str:
    """Return what a search found, in a sentence."""
    stages = f"{found.stages} stages"
    if found.sustained is None:
        tried = "" if found.refused is None else f"; not even {found.refused:.4g} requests/s was sustained"
        return f"{found.goal}: not found in {stages}{tried}"
    if found.refused is None:
        return f"{found.goal}: at least {found.sustained:.4g} requests/s, the highest rate tried in {stages}"
    if found.invalid_stages:
        stages += f", of which {found.invalid_stages} invalid: the load generator was late, so do not trust this"
    near = "" if found.converged else "; not yet as near as --find-tolerance asks, give it more --find-stages"
    if found.estimate is not None:
        tried = f"by a line through all stages; {found.sustained:.4g} was sustained, {found.refused:.4g} was not"
        return f"{found.goal}: {found.estimate:.4g} requests/s ({tried}), in {stages}{near}"
    return f"{found.goal}: {found.sustained:.4g} requests/s ({found.refused:.4g} was not sustained), in {stages}{near}"


def _throughput_table(stages: Sequence[StageResult]) -> Table:
    table = Table(box=SIMPLE)
    table.add_column("load", no_wrap=True)
    for heading in ("ok", "failed", "seconds", "req/s", "out tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    with_goodput = any(stage.goodput for stage in stages)
    if with_goodput:
        table.add_column("good/s", justify="right", no_wrap=True)
        table.add_column("good", justify="right", no_wrap=True)
    with_energy = any(stage.energy for stage in stages)
    if with_energy:
        table.add_column("J/token", justify="right", no_wrap=True)
        table.add_column("W", justify="right", no_wrap=True)
    for stage in stages:
        rates, good = stage.throughput, stage.goodput
        cells = [_marked(stage), str(stage.requests.ok), str(stage.requests.failed)]
        if rates:
            cells += [f"{rates.window_s:.1f}", f"{rates.requests_per_s:.2f}"]
            cells.append("-" if rates.output_tokens_per_s is None else f"{rates.output_tokens_per_s:.1f}")
        else:
            cells += ["-"] * 3
        if with_goodput:
            cells += [f"{good.requests_per_s:.2f}", f"{good.fraction:.0%}"] if good else ["-", "-"]
        if with_energy:
            energy = stage.energy
            numbers = (energy.joules_per_output_token, energy.mean_watts) if energy else (None, None)
            cells += ["-" if number is None else f"{number:.3g}" for number in numbers]
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
            # In a closed loop both are the same.
            *([("TTFT from send", latency.ttft_from_send_ms)] if stage.mode == "open" else []),
            ("TPOT", latency.tpot_ms),
            ("ITL", latency.itl_ms),
            ("end to end", latency.e2e_ms),
        )
        for number, (name, values) in enumerate(rows):
            table.add_row("" if number else _marked(stage), name, *_cells(values), end_section=number == len(rows) - 1)
    return table


def _marked(stage: StageResult) -> str:
    return load_name(stage) + (" (invalid)" if stage.invalid else "")


def _cells(values: Distribution | None) -> list[str]:
    if values is None:
        return ["-"] * 6
    # Four digits need no decimal, and six columns of them must fit into 80 characters.
    return [
        f"{v:.1f}" if v < 1000 else f"{v:.0f}"
        for v in (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
    ]
