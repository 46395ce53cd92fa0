"""Renders the report: one HTML page without any outside resource."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, Template

from bench.engine import plain_dtype
from bench.quality.schema import EvalReport, NeedleCell, TaskResult, shown_p
from bench.report import plots
from bench.report.documents import Inputs, Recipe
from bench.report.figures import NONE, milliseconds
from bench.report.models import short_model
from bench.report.rows import Frontier, Row, stage_label
from bench.report.table import DASH, Cell, cells, columns
from bench.speed.schema import KVBenchReport, Point, Spread
from bench.speed.served_schema import ServeBenchReport
from bench.speed.served_table import cells as endpoint
from bench.speed.served_table import notes as remarks
from kv_cache.sizes import readable
from loadtest.results.schema import Distribution, StageResult, Summary

STAGE_HEADINGS = (
    "configuration and load", "requests", "failed", "TTFT P50", "P95", "P99", "TPOT P50", "P95", "P99",
    "output tokens/s", "requests/s",
)  # fmt: skip


def page_template(package: str, name: str) -> Template:
    """Return a template of a package, which may extend ``base.html.j2``: the look that all pages share."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("bench.report")])
    return Environment(autoescape=True, trim_blocks=True, loader=loader).get_template(name)


def render(title: str, inputs: Inputs, rows: list[Row], trade_offs: list[Frontier], notes: list[str]) -> str:
    """Return the page's HTML."""
    template = page_template("bench.report", "report.html.j2")
    tests = [(_load_name(test, rows, path), test) for path, test in inputs.of(Summary)]
    budgets = {row.get("kv_budget_bytes") for row in rows} - {None}
    trials = {cell.accuracy.n for cell in _needle_cells(inputs)}
    grouped = [(head, group) for head, group in columns() if any(m.key in row.figures for m in group for row in rows)]
    return template.render(
        title=title,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rows=rows,
        headings=["configuration", *(heading for heading, _ in grouped)],
        table=[(row.name + (" (baseline)" if row.is_baseline else ""), cells(row, grouped)) for row in rows],
        same_budget=readable(budgets.pop() or 0) if len(budgets) == 1 else "",
        frontiers=[
            {"title": f.title, "svg": plots.frontier_plot(f), "best": "; ".join(p[0] for p in f.points if p[3])}
            for f in trade_offs
        ],
        tasks=task_table(inputs, rows),
        needles=_needles(inputs, rows),
        needle_trials=trials.pop() if len(trials) == 1 else "several",
        latency=_latency(tests),
        stage_headings=STAGE_HEADINGS,
        stages=[_stage(name, stage) for name, test in tests for stage in test.stages],
        kv_benches=[_kv_bench(bench) for _, bench in inputs.of(KVBenchReport)],
        endpoints=[(short_model(e.model), *endpoint(e), remarks(e)) for _, e in inputs.of(ServeBenchReport)],
        recipes=[_recipe(path, recipe) for path, recipe in inputs.of(Recipe)],
        environments=_environments(inputs),
        sources=[str(path) for path, _ in inputs.documents],
        skipped=inputs.skipped,
        notes=notes,
    )


def _load_name(test: Summary, rows: list[Row], path: Path) -> str:
    """Return the configuration that a load test belongs to, as the table calls it."""
    return next((row.name for row in rows if str(path) in row.sources), test.label)


def task_table(inputs: Inputs, rows: list[Row]) -> dict[str, Any] | None:
    """Return the table of tasks, a line a task and metric and a column a configuration; None without any.

    A cell has the value, and below it the change against the baseline with its p, that of the whole table, the smallest
    change that would have been shown, and the verdict with its margin; the newest evaluation of a configuration counts.
    """
    names = {(row.fingerprint, row.kv_cache_dtype): row.name for row in rows}
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for _, evaluation in sorted(inputs.of(EvalReport), key=lambda item: item[1].created_at):
        for result in evaluation.configurations:
            name = names[result.model.fingerprint, plain_dtype(result.kv_cache.dtype)]
            for task in result.tasks:
                found.setdefault((task.task, task.metric), {})[name] = _task_cell(task)
    used = [row.name for row in rows if any(row.name in cells for cells in found.values())]
    if not used:
        return None
    lines = [(f"{task}, {metric}", [found[task, metric].get(name, DASH) for name in used]) for task, metric in found]
    return {"headings": ["task", *used], "lines": lines}


def _task_cell(task: TaskResult) -> Cell:
    error = f" ± {task.value.standard_error:.4f}" if task.value.standard_error is not None else ""
    value, flips = f"{task.value.value:.4f}{error}", task.flips
    if flips is not None:
        return Cell(
            value,
            f"{flips.right_to_wrong:,} right to wrong, {flips.wrong_to_right:,} wrong to right, "
            f"{flips.wrong_to_wrong:,} wrong to wrong",
        )
    if task.change is None or task.p is None:
        return Cell(value)
    said = [f"{task.change.value:+.4f}", f"p {shown_p(task.p)}"]
    said += [f"Holm {shown_p(task.p_holm)}"] if task.p_holm is not None else []
    said += [f"smallest {task.smallest:.4f}"] if task.smallest is not None else []
    return Cell(value, ", ".join(said + ([task.judged] if task.judged else [])))


def _needle_cells(inputs: Inputs) -> list[NeedleCell]:
    results = [result for _, evaluation in inputs.of(EvalReport) for result in evaluation.configurations]
    return [cell for result in results if result.needle for cell in result.needle.cells]


def _needles(inputs: Inputs, rows: list[Row]) -> list[dict[str, Any]]:
    """Return a heat map for each configuration, its worst cell deciding nothing but its own colour."""
    maps: dict[str, dict[str, Any]] = {}
    names = {(row.fingerprint, row.kv_cache_dtype): row.name for row in rows}
    for _, evaluation in inputs.of(EvalReport):
        for result in evaluation.configurations:
            if not result.needle:
                continue
            found = {(cell.length, cell.depth): cell.accuracy.value for cell in result.needle.cells}
            depths = sorted({depth for _, depth in found})
            lines = [
                (f"{length:,}", [_heat(found.get((length, depth))) for depth in depths])
                for length in sorted({length for length, _ in found})
            ]
            name = names.get((result.model.fingerprint, plain_dtype(result.kv_cache.dtype)), result.name)
            maps[name] = {"name": name, "depths": [f"{d:.0%}" for d in depths], "lines": lines}
    return list(maps.values())


def _heat(value: float | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"text": f"{value:.0%}", "alpha": f"{0.04 + 0.5 * value**2:.2f}", "low": value < 0.9}


def _latency(tests: list[tuple[str, Summary]]) -> list[dict[str, str]]:
    made = []
    for key, title in (("ttft_ms", "Time to first token"), ("tpot_ms", "Time per output token")):
        lines = [
            (f"{name}, {stage_label(stage)}", found)
            for name, test in tests
            for stage in test.stages
            if (found := getattr(stage.latency, key)) is not None
        ]
        if lines:
            made.append({"title": title, "svg": plots.percentile_plot(title, "ms", lines)})
    sweep = plots.sweep_plot(tests)
    if sweep:
        made.append({"title": "Throughput against P95 time to first token", "svg": sweep})
    return made


def _stage(name: str, stage: StageResult) -> list[str]:
    def values(found: Distribution | None) -> list[str]:
        return [milliseconds(x) for x in (found.p50, found.p95, found.p99)] if found else [NONE] * 3

    rates = stage.throughput
    return [
        f"{name}, {stage_label(stage)}",
        str(stage.requests.ok + stage.requests.failed),
        str(stage.requests.failed),
        *values(stage.latency.ttft_ms),
        *values(stage.latency.tpot_ms),
        f"{rates.output_tokens_per_s:,.1f}" if rates and rates.output_tokens_per_s is not None else NONE,
        f"{rates.requests_per_s:,.2f}" if rates else NONE,
    ]


def _kv_bench(bench: KVBenchReport) -> dict[str, Any]:
    points = [point for dtype in bench.dtypes for point in dtype.points]
    grid = sorted({(p.batch, p.context) for p in points})
    best = {at: max(p.step_ratio or 0 for p in points if (p.batch, p.context) == at) for at in grid}
    headings = ["KV-cache dtype", "KV tokens"]
    for batch, context in grid:
        headings += [f"{batch} x {context:,}: ms/step", "speed", "prefill tokens/s", "speed"]
    rows = []
    for dtype in bench.dtypes:
        if dtype.error:
            rows.append((dtype.kv_cache_dtype, [Cell(f"not measured: {dtype.error}"[:90])]))
            continue
        found = {(p.batch, p.context): p for p in dtype.points}
        ratio = f"{dtype.capacity_ratio:.2f}x" if dtype.capacity_ratio else ""
        line = [Cell(f"{dtype.kv_cache.tokens:,}", ratio) if dtype.kv_cache else DASH]
        for at in grid:
            line += _point(found[at], best[at]) if at in found else [DASH] * 4
        rows.append((plain_dtype(dtype.kv_cache_dtype), line))
    return {
        "title": short_model(bench.model),
        "headings": headings,
        "rows": rows,
        "rounds": max((p.step_ms.n for p in points), default=0),
        "baseline": plain_dtype(bench.baseline),
    }


def _point(point: Point, best: float) -> list[Cell]:
    return [
        _spread(point.step_ms, ".2f"),
        _ratio(point.step_ratio, best),
        _spread(point.prefill_tokens_per_s, ",.0f"),
        _ratio(point.prefill_ratio, None),
    ]


def _spread(value: Spread, form: str) -> Cell:
    return Cell(format(value.median, form), f"{value.low:{form}} to {value.high:{form}}")


def _ratio(value: float | None, best: float | None) -> Cell:
    if value is None:
        return DASH
    return Cell(f"{value:.2f}x", best=best is not None and value == best and value > 1)


def _recipe(path: Path, made: Recipe) -> dict[str, str]:
    steps = made.recipe.get("steps") or []
    names = " + ".join(" ".join(str(s[k]) for k in ("method", "bits") if k in s) for s in steps if isinstance(s, dict))
    data = made.calibration or {}
    calibration = (
        f"{data['num_samples']} x {data['length']} tokens, {data['source']}" if data.get("num_samples") else "none"
    )
    return {
        "folder": path.parent.name, "model": made.model,
        "recipe": names or str(made.recipe.get("name", NONE)), "calibration": calibration,
    }  # fmt: skip


def _environments(inputs: Inputs) -> list[list[tuple[str, str]]]:
    """Return what results were measured with, each distinct machine and set of versions once."""
    made: list[list[tuple[str, str]]] = []
    kinds: list[tuple[str, list[tuple[Path, dict[str, Any]]]]] = [
        ("quality", [(path, document.environment) for path, document in inputs.of(EvalReport)]),
        ("KV-cache speed", [(path, document.environment) for path, document in inputs.of(KVBenchReport)]),
        ("endpoint", [(path, document.environment) for path, document in inputs.of(ServeBenchReport)]),
        ("load", [(path, document.environment) for path, document in inputs.of(Summary)]),
    ]
    for kind, found in kinds:
        for path, environment in found:
            lines = described(f"{kind} ({path.name})", environment)
            if lines not in made:
                made.append(lines)
    return made


def described(what: str, environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Return an environment as lines of a name and a text, the first of which says what was measured in it."""
    lines = [("measured", what)]
    for key, value in environment.items():
        inner = value.items() if isinstance(value, dict) else None
        lines.append((key, ", ".join(f"{k} {_plain(v)}" for k, v in inner) if inner else _plain(value)))
    return lines


def _plain(value: Any) -> str:
    if value is None:
        return "unknown"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
