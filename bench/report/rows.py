"""Joins results of several commands into one row for each configuration: a model and a KV-cache dtype."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bench.engine import plain_dtype
from bench.frontier import non_dominated
from bench.quality.schema import ConfigurationResult, EvalReport
from bench.report.documents import Inputs
from bench.report.figures import Figure
from bench.report.metrics import BY_KEY, LOSS, LOSS_LABEL, METRICS, MORE, TRADE_OFFS, TradeOff
from bench.report.models import Models
from bench.schema import KVCache
from bench.speed.schema import DtypeResult, KVBenchReport
from bench.speed.served_schema import ServeBenchReport, ServedDtype
from loadtest.results.schema import StageResult, Summary

KEY = tuple[str, str]
"""A model's identity (bench/report/models.py) and a KV-cache dtype."""
LOAD = tuple[str, str]
"""What a load test asked for, and how often (a stage's label)."""


Ends = tuple[float, float] | None


@dataclass
class Row:
    """One configuration.

    Attributes:
        name: unique in the report.
        model: the model's name, as much of it as tells it from the report's other models.
        kv_cache_dtype: ``bf16`` for a cache that is not quantized.
        is_baseline: what others are compared with.
        fingerprint: of the model's files; its name in results that have none.
        load: the load that the report compares at, the same for all rows; None where that was not measured.
        figures: by a metric's key (bench/report/metrics.py), those that a given file has.
        sources: files.
        loads: figures by load, of every stage of every load test.

    """

    name: str
    model: str
    kv_cache_dtype: str
    is_baseline: bool = False
    fingerprint: str | None = None
    load: str | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    loads: dict[LOAD, dict[str, Figure]] = field(default_factory=dict, repr=False)

    def get(self, key: str) -> float | None:
        """Return a metric's value, that of a comparison with itself for the baseline; None if no file has it."""
        if self.is_baseline and BY_KEY[key].of_baseline is not None:
            return BY_KEY[key].of_baseline
        figure = self.figures.get(key)
        return None if figure is None else figure.value

    def put(self, key: str, figure: Figure | None) -> None:
        """Set a metric's figure, if there is one."""
        if figure is not None:
            self.figures[key] = figure


@dataclass(frozen=True)
class Frontier:
    """A trade-off: (name, x, y, on the frontier) of each row that has both figures.

    ``bars`` has the ends of the 95% intervals by name, of x and of y; None for one that is not known.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    larger_x_is_better: bool
    points: list[tuple[str, float, float, bool]]
    larger_y_is_better: bool = False
    bars: dict[str, tuple[Ends, Ends]] = field(default_factory=dict)


def make_rows(inputs: Inputs, context_tokens: int) -> tuple[list[Row], list[str]]:
    """Return one row a configuration, baselines first, and remarks on what was replaced or could not be joined."""
    rows: dict[KEY, Row] = {}
    models = Models()
    labels: dict[str, set[KEY]] = {}
    notes: list[str] = []

    def row_of(key: KEY) -> Row:
        return rows.setdefault(key, Row("", key[0], key[1]))

    for file, evaluation in sorted(inputs.of(EvalReport), key=lambda item: item[1].created_at):
        for result in evaluation.configurations:
            key = (models.add(result.model.fingerprint, result.model.name), plain_dtype(result.kv_cache.dtype))
            labels.setdefault(result.name, set()).add(key)
            row = row_of(key)
            # A model's own bf16 row is repeated in every evaluation that uses it as the baseline.
            if "perplexity" in row.figures and not result.is_baseline:
                notes.append(f"{file}: replaces an older evaluation of {result.name}")
            if row.is_baseline and result.is_baseline and "needle" in row.figures:
                row.sources.append(str(file))
                continue
            _add_eval(row, result, file)
        for failure in evaluation.failed:
            notes.append(f"{file}: {failure.name} could not be measured: {failure.error}")
    for file, test in sorted(inputs.of(Summary), key=lambda item: item[1].started_at):
        named = labels.get(test.label, set())
        key = next(iter(named)) if len(named) == 1 else _loadtest_key(test, models, file)
        _add_load(row_of(key), test, file)
    for file, bench in sorted(inputs.of(KVBenchReport), key=lambda item: item[1].created_at):
        for dtype in _measured(bench.dtypes, file, notes):
            name = dtype.model or bench.model
            identity = models.add(dtype.fingerprint, name) if dtype.fingerprint else models.named(name, file)
            _add_kv_bench(row_of((identity, plain_dtype(dtype.kv_cache_dtype))), dtype, file)
    for file, served in sorted(inputs.of(ServeBenchReport), key=lambda item: item[1].created_at):
        known = served.fingerprint
        identity = models.add(known, served.model) if known else models.named(served.model, file)
        for each in _measured(served.dtypes, file, notes):
            _add_served(row_of((identity, plain_dtype(each.kv_cache_dtype))), served, each, file)
    called = models.labels()
    for row in rows.values():
        row.model = called[row.model]
        row.name = f"{row.model}, {row.kv_cache_dtype} KV"
    _compare_at_equal_load(list(rows.values()), notes)
    for row in rows.values():
        for metric in METRICS:
            if metric.derived:
                row.put(metric.key, metric.derived(row, context_tokens))
    ordered = sorted(
        rows.values(), key=lambda r: (not r.is_baseline, r.model, -(r.get("kv_bits") or 16), r.kv_cache_dtype)
    )
    return ordered, [*notes, *models.notes]


Measured = TypeVar("Measured", DtypeResult, ServedDtype)


def _measured(dtypes: Sequence[Measured], file: Path, notes: list[str]) -> list[Measured]:
    """Return the dtypes that have figures, and note why others have none."""
    notes += [f"{file}: {d.kv_cache_dtype} could not be measured: {d.error}" for d in dtypes if d.error]
    return [dtype for dtype in dtypes if not dtype.error and dtype.points]


def _add_eval(row: Row, result: ConfigurationResult, file: Path) -> None:
    row.is_baseline, row.fingerprint = result.is_baseline, result.model.fingerprint
    for metric in METRICS:
        if metric.quality:
            row.figures.pop(metric.key, None)
            row.put(metric.key, metric.quality(result))
    row.sources.append(str(file))


def _loadtest_key(test: Summary, models: Models, file: Path) -> KEY:
    dtype = test.server.cache_config.get("cache_dtype")
    # A label that names a KV dtype of its own is a better key than a server that told nothing of itself.
    named = plain_dtype(dtype) if dtype else (test.label or "unknown")
    return models.named(test.server.model, file), named


def stage_label(stage: StageResult) -> str:
    """Return what load a stage was."""
    if stage.concurrency is not None:
        return users(stage.concurrency)
    return f"{stage.rate:g}/s"


def users(count: int) -> str:
    """Return how many users there were, in words."""
    return f"{count} user{'s' if count != 1 else ''}"


WORKLOAD = (
    *("prompt_tokens", "output_tokens", "prefix_tokens", "prefix_pool", "prompt_token_ids", "prompts", "ignore_eos"),
    *("trace", "turns", "turn_tokens", "think_time_ms"),
)
"""Settings of a load test that say what was asked for; how often, its stages say."""


def _add_load(row: Row, test: Summary, file: Path) -> None:
    """Keep the figures of each stage by its load: what was asked for, and how often."""
    row.sources.append(str(file))
    workload = json.dumps([test.settings.get(name) for name in WORKLOAD], default=str)
    for stage in test.stages:
        if stage.throughput and stage.latency.ttft_ms:
            found = {metric.key: metric.load(stage) for metric in METRICS if metric.load}
            row.loads[workload, stage_label(stage)] = {key: figure for key, figure in found.items() if figure}


def _compare_at_equal_load(rows: list[Row], notes: list[str]) -> None:
    """Give each row its figures under the load that most rows were measured under; others have none in the comparison.

    Of several such loads it is the one with the highest throughput over these rows. A configuration under a load of its
    own would be compared with what the others do under another one.
    """
    tested = [row for row in rows if row.loads]
    counts: dict[LOAD, list[float]] = {}
    for row in tested:
        for load, figures in row.loads.items():
            if "output_tokens_per_s" in figures:
                counts.setdefault(load, []).append(figures["output_tokens_per_s"].value)
    if not counts:
        return
    chosen = max(counts, key=lambda load: (len(counts[load]), sum(counts[load])))
    for row in tested:
        if chosen in row.loads:
            row.load = chosen[1]
            row.figures |= row.loads[chosen]
        else:
            notes.append(
                f"{row.name}: no load test under the load of the others ({chosen[1]}, the same prompts and answers), "
                "so its latency and throughput are not compared"
            )


def _add_kv_bench(row: Row, dtype: DtypeResult, file: Path) -> None:
    """Take the point with the most context in flight: that is where the KV cache matters."""
    point = max(dtype.points, key=lambda p: p.batch * p.context)
    for metric in METRICS:
        if metric.speed:
            row.put(metric.key, metric.speed(dtype, point))
    _add_cache(row, dtype.kv_cache)
    row.sources.append(str(file))


def _add_served(row: Row, bench: ServeBenchReport, dtype: ServedDtype, file: Path) -> None:
    """Keep the figures of each point by its load, as a load test's; the answers' length is part of what was asked."""
    for point in dtype.points:
        workload = json.dumps([bench.schema, point.context, bench.settings.get("output_tokens")])
        found = {metric.key: metric.served(dtype, point) for metric in METRICS if metric.served}
        label = f"{users(point.batch)} of {point.context:,} tokens"
        row.loads[workload, label] = {key: figure for key, figure in found.items() if figure}
    _add_cache(row, dtype.kv_cache)
    row.sources.append(str(file))


def _add_cache(row: Row, cache: KVCache | None) -> None:
    for metric in METRICS:
        # An evaluation measured what both say.
        if metric.cache and cache and metric.key not in row.figures:
            row.put(metric.key, metric.cache(cache))


def frontiers(rows: Sequence[Row], context_tokens: int) -> list[Frontier]:
    """Return the trade-offs for which at least two rows have figures."""
    load = next((row.load for row in rows if row.load), "")
    made = [_frontier(trade, rows, trade.label.format(context=context_tokens, load=load)) for trade in TRADE_OFFS]
    return [frontier for frontier in made if len(frontier.points) > 1]


def _frontier(trade: TradeOff, rows: Sequence[Row], label: str) -> Frontier:
    larger = BY_KEY[trade.metric].better == MORE
    values = [(row.name, row.get(trade.metric), row.get(LOSS)) for row in rows]
    points = [(name, x / trade.per, y) for name, x, y in values if x and y is not None]
    best = non_dominated([(-x if larger else x, y) for _, x, y in points])
    marked = [(*point, on) for point, on in zip(points, best, strict=True)]
    return Frontier(trade.key, trade.title, label, LOSS_LABEL, larger, marked)


def to_json(rows: Sequence[Row], trade_offs: Sequence[Frontier]) -> dict[str, Any]:
    """Return what the metrics are, rows and frontiers as JSON-ready values."""
    return {
        "metrics": [{"key": m.key, "unit": m.unit, "better": m.better or None} for m in METRICS],
        "configurations": [
            {name: value for name, value in asdict(row).items() if name != "loads"}
            | {"stages": [{"load": load, "figures": _plain(found)} for (_, load), found in row.loads.items()]}
            for row in rows
        ],
        "frontiers": [
            {"key": f.key, "title": f.title, "x_label": f.x_label, "y_label": f.y_label}
            | {"larger_x_is_better": f.larger_x_is_better}
            | {"points": [dict(zip(("name", "x", "y", "on_frontier"), p, strict=True)) for p in f.points]}
            for f in trade_offs
        ],
    }


def _plain(figures: dict[str, Figure]) -> dict[str, Any]:
    return {key: asdict(figure) for key, figure in figures.items()}
