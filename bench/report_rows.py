"""Joins results of several commands into one row for each configuration: a model and a KV-cache dtype."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.engine import PLAIN_DTYPES
from bench.frontier import non_dominated
from bench.report_inputs import Document, Inputs
from bench.report_models import Models

KEY = tuple[str, str]
"""A model's identity (bench/report_models.py) and a KV-cache dtype."""


@dataclass
class Row:
    """One configuration. None is a figure that no given file has.

    Attributes:
        name: unique in the report.
        model: the model's name, as much of it as tells it from the report's other models.
        kv_cache_dtype: ``bf16`` for a cache that is not quantized.
        is_baseline: the reference of ``kl`` and ``top1``.
        weight_bits: bits for each parameter of the original, everything counted.
        weight_bytes: size of the checkpoint's tensors.
        kv_bits: bits for each element of a key or value.
        kv_bytes_per_token: all layers.
        kv_tokens: tokens that fit in ``kv_budget_bytes``.
        kv_budget_bytes: memory given to the cache.
        memory_bytes: weights and ``context_tokens`` of cache together.
        perplexity: with ``perplexity_change`` against the baseline; each an estimate (bench/schema.py).
        kl: nats per token, an estimate.
        top1: an estimate.
        needle: an estimate.
        load: ``stage`` (what load it was), TTFT and TPOT P50 and P95 in ms, output tokens per second, under the load
            that the report compares at, the same for all rows; None where that was not measured.
        fingerprint: of the model's files; its name in results that have none.
        loads: figures by load, of every stage of every load test.
        step_ratio: decode speed against bf16 (kv-bench), at ``step_point``.

    """

    name: str
    model: str
    kv_cache_dtype: str
    is_baseline: bool = False
    weight_bits: float | None = None
    weight_bytes: int | None = None
    kv_bits: float | None = None
    kv_bytes_per_token: float | None = None
    kv_tokens: int | None = None
    kv_budget_bytes: int | None = None
    memory_bytes: float | None = None
    perplexity: Document | None = None
    perplexity_change: Document | None = None
    kl: Document | None = None
    top1: Document | None = None
    needle: Document | None = None
    load: Document | None = None
    step_ratio: float | None = None
    step_point: str | None = None
    sources: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    loads: dict[tuple[str, str], Document] = field(default_factory=dict, repr=False)

    @property
    def loss(self) -> float | None:
        """Return the divergence from the baseline in nats per token: 0 for the baseline itself."""
        if self.is_baseline:
            return 0.0
        return None if self.kl is None else float(self.kl["value"])

    @property
    def speed(self) -> float | None:
        """Return output tokens per second under load."""
        return None if self.load is None else float(self.load["output_tokens_per_s"])


@dataclass(frozen=True)
class Frontier:
    """A trade-off: (name, x, y, on the frontier) of each row that has both figures."""

    key: str
    title: str
    x_label: str
    y_label: str
    larger_x_is_better: bool
    points: list[tuple[str, float, float, bool]]


def plain_dtype(name: str | None) -> str:
    """Return a KV-cache dtype's name with all unquantized ones as ``bf16``."""
    return "bf16" if not name or name in PLAIN_DTYPES or name == "None" else name


def make_rows(inputs: Inputs, context_tokens: int) -> tuple[list[Row], list[str]]:
    """Return one row a configuration, baselines first, and remarks on what was replaced or could not be joined."""
    rows: dict[KEY, Row] = {}
    models = Models()
    labels: dict[str, set[KEY]] = {}
    notes: list[str] = []

    def row_of(key: KEY) -> Row:
        return rows.setdefault(key, Row("", key[0], key[1]))

    for file, document in _newest_last(inputs.evals, "created_at"):
        for entry in document["configurations"]:
            model = entry["model"]
            name = str(model["name"])
            identity = models.add(model["fingerprint"], name) if model.get("fingerprint") else models.named(name, file)
            key = (identity, plain_dtype(entry["kv_cache"]["dtype"]))
            labels.setdefault(entry["name"], set()).add(key)
            # A model's own bf16 row is repeated in every evaluation that uses it as the baseline.
            if key in rows and rows[key].perplexity is not None and not entry["is_baseline"]:
                notes.append(f"{file}: replaces an older evaluation of {entry['name']}")
            if key in rows and rows[key].is_baseline and entry["is_baseline"] and rows[key].needle:
                rows[key].sources.append(str(file))
                continue
            _add_eval(row_of(key), entry, file, context_tokens)
        for failure in document.get("failed", ()):
            notes.append(f"{file}: {failure['name']} could not be measured: {failure['error']}")
    for file, document in _newest_last(inputs.loadtests, "started_at"):
        named = labels.get(document["label"], set())
        key = next(iter(named)) if len(named) == 1 else _loadtest_key(document, models, file)
        _add_load(row_of(key), document, file)
    for file, document in _newest_last(inputs.kv_benches, "created_at"):
        for entry in document["dtypes"]:
            if entry["error"]:
                notes.append(f"{file}: {entry['kv_cache_dtype']} could not be measured: {entry['error']}")
            if entry["error"] or not entry["points"]:
                continue
            name, mark = str(entry.get("model") or document["model"]), entry.get("fingerprint")
            identity = models.add(mark, name) if mark else models.named(name, file)
            _add_kv_bench(row_of((identity, plain_dtype(entry["kv_cache_dtype"]))), entry, file)
    called = models.labels()
    for row in rows.values():
        row.model = called[row.model]
        row.name = f"{row.model}, {row.kv_cache_dtype} KV"
    _compare_at_equal_load(list(rows.values()), notes)
    ordered = sorted(rows.values(), key=lambda r: (not r.is_baseline, r.model, -(r.kv_bits or 16), r.kv_cache_dtype))
    return ordered, [*notes, *models.notes]


def _newest_last(documents: list[tuple[Path, Document]], key: str) -> list[tuple[Path, Document]]:
    return sorted(documents, key=lambda item: str(item[1].get(key, "")))


def _add_eval(row: Row, entry: Document, file: Path, context_tokens: int) -> None:
    model, cache, text = entry["model"], entry["kv_cache"], entry["overall"]
    row.is_baseline = bool(entry["is_baseline"])
    row.fingerprint = model.get("fingerprint") or model["name"]
    row.weight_bits, row.weight_bytes = model.get("bits_per_weight"), model["weight_bytes"]
    row.kv_bits, row.kv_bytes_per_token = cache.get("bits_per_element"), cache["bytes_per_token"]
    row.kv_tokens, row.kv_budget_bytes = cache["tokens"], cache["budget_bytes"]
    row.memory_bytes = model["weight_bytes"] + context_tokens * cache["bytes_per_token"]
    if text:
        row.perplexity, row.perplexity_change = text["perplexity"], text["perplexity_change"]
        row.kl, row.top1 = text["kl"], text["top1_agreement"]
    row.needle = entry["needle"]["accuracy"] if entry["needle"] else None
    row.sources.append(str(file))


def _loadtest_key(document: Document, models: Models, file: Path) -> KEY:
    server = document["server"]
    dtype = server["cache_config"].get("cache_dtype")
    # A label that names a KV dtype of its own is a better key than a server that told nothing of itself.
    named = plain_dtype(dtype) if dtype else (document["label"] or "unknown")
    return models.named(str(server["model"]), file), named


def stage_label(stage: Document) -> str:
    """Return what load a stage was."""
    if stage["concurrency"] is not None:
        return f"{stage['concurrency']} user{'s' if stage['concurrency'] != 1 else ''}"
    return f"{stage['rate']:g}/s"


WORKLOAD = ("prompt_tokens", "output_tokens", "prefix_tokens", "prompt_token_ids", "prompts", "ignore_eos")
"""Settings of a load test that say what was asked for; how often, its stages say."""


def _add_load(row: Row, document: Document, file: Path) -> None:
    """Keep the figures of each stage by its load: what was asked for, and how often."""
    row.sources.append(str(file))
    settings = document.get("settings") or {}
    workload = json.dumps([settings.get(name) for name in WORKLOAD], default=str)
    for stage in document["stages"]:
        if stage["throughput"] and stage["latency"]["ttft_ms"]:
            row.loads[workload, stage_label(stage)] = _stage_figures(stage)


def _stage_figures(stage: Document) -> Document:
    ttft, tpot = stage["latency"]["ttft_ms"], stage["latency"]["tpot_ms"]
    return {
        "stage": stage_label(stage),
        "ttft_p50_ms": ttft["p50"],
        "ttft_p95_ms": ttft["p95"],
        "tpot_p50_ms": tpot["p50"] if tpot else None,
        "tpot_p95_ms": tpot["p95"] if tpot else None,
        "output_tokens_per_s": stage["throughput"]["output_tokens_per_s"],
        "failed": stage["requests"]["failed"],
    }


def _compare_at_equal_load(rows: list[Row], notes: list[str]) -> None:
    """Give each row its figures under the load that most rows were measured under; others have none in the comparison.

    Of several such loads it is the one with the highest throughput over these rows. A configuration under a load of its
    own would be compared with what the others do under another one.
    """
    tested = [row for row in rows if row.loads]
    counts: dict[tuple[str, str], list[float]] = {}
    for row in tested:
        for load, figures in row.loads.items():
            counts.setdefault(load, []).append(float(figures["output_tokens_per_s"]))
    if not counts:
        return
    chosen = max(counts, key=lambda load: (len(counts[load]), sum(counts[load])))
    for row in tested:
        row.load = row.loads.get(chosen)
        if row.load is None:
            notes.append(
                f"{row.name}: no load test under the load of the others ({chosen[1]}, the same prompts and answers), "
                "so its latency and throughput are not compared"
            )


def _add_kv_bench(row: Row, entry: Document, file: Path) -> None:
    """Take the point with the most context in flight: that is where the KV cache matters."""
    point = max(entry["points"], key=lambda p: p["batch"] * p["context"])
    row.step_ratio = point["step_ratio"]
    row.step_point = f"{point['batch']}x{point['context']}"
    if row.kv_tokens is None and entry["kv_cache"]:
        row.kv_tokens, row.kv_bits = entry["kv_cache"]["tokens"], entry["kv_cache"]["bits_per_element"]
        row.kv_bytes_per_token = entry["kv_cache"]["bytes_per_token"]
        row.kv_budget_bytes = entry["kv_cache"]["budget_bytes"]
    row.sources.append(str(file))


def frontiers(rows: list[Row], context_tokens: int) -> list[Frontier]:
    """Return the trade-offs for which at least two rows have figures."""
    loss = "KL divergence from bf16, nats per token"
    memory = [(r.name, r.memory_bytes / 2**20, r.loss) for r in rows if r.memory_bytes and r.loss is not None]
    speed = [(r.name, r.speed, r.loss) for r in rows if r.speed and r.loss is not None]
    stage = next((r.load["stage"] for r in rows if r.load), "")
    step = [(r.name, r.step_ratio, r.loss) for r in rows if r.step_ratio and r.loss is not None]
    made = [
        _frontier("memory", "Quality against memory", f"weights + {context_tokens:,} tokens of KV cache, MiB", loss,
                  memory, larger=False),
        _frontier("throughput", "Quality against throughput", f"output tokens per second at {stage}", loss, speed,
                  larger=True),
        _frontier("decode", "Quality against decode speed", "decode speed relative to bf16 KV", loss, step,
                  larger=True),
    ]  # fmt: skip
    return [f for f in made if len(f.points) > 1]


def _frontier(
    key: str, title: str, x_label: str, y_label: str, points: list[tuple[str, float, float]], *, larger: bool
) -> Frontier:
    sign = -1 if larger else 1
    best = non_dominated([(sign * x, y) for _, x, y in points])
    marked = [(*point, on) for point, on in zip(points, best, strict=True)]
    return Frontier(key, title, x_label, y_label, larger, marked)


def to_json(rows: list[Row], trade_offs: list[Frontier]) -> dict[str, Any]:
    """Return rows and frontiers as JSON-ready values."""
    return {
        "configurations": [
            {name: value for name, value in asdict(row).items() if name != "loads"}
            | {"stages": list(row.loads.values())}
            for row in rows
        ],
        "frontiers": [
            asdict(f) | {"points": [dict(zip(("name", "x", "y", "on_frontier"), p, strict=True)) for p in f.points]}
            for f in trade_offs
        ],
    }
