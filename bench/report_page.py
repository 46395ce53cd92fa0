"""Renders the report: one HTML page without any outside resource."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from bench import plots
from bench.report_inputs import Document, Inputs
from bench.report_models import short_model
from bench.report_rows import Frontier, Row, plain_dtype, stage_label
from kv_cache.sizes import readable

Cell = dict[str, str]
NONE = "\u2013"
DASH: Cell = {"text": NONE, "sub": ""}
HEADINGS = (
    "configuration", "weight bits", "KV bits", "weights", "KV tokens", "perplexity", "KL, nats", "top-1", "needle",
    "TTFT P50 / P95, ms", "TPOT P50 / P95, ms", "output tokens/s", "decode speed",
)  # fmt: skip
STAGE_HEADINGS = (
    "configuration and load", "requests", "failed", "TTFT P50", "P95", "P99", "TPOT P50", "P95", "P99",
    "output tokens/s", "requests/s",
)  # fmt: skip


def render(title: str, inputs: Inputs, rows: list[Row], trade_offs: list[Frontier], notes: list[str]) -> str:
    """Return the page's HTML."""
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        resources.files("bench").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    )
    load_documents = [(_load_name(d, rows, p), d) for p, d in inputs.loadtests]
    budgets = {row.kv_budget_bytes for row in rows if row.kv_budget_bytes}
    needles = _needles(inputs, rows)
    trials = {cell["accuracy"]["n"] for cell in _cells(inputs)}
    return template.render(
        title=title,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rows=rows,
        headings=HEADINGS,
        table=[_row(row) for row in rows],
        same_budget=readable(budgets.pop()) if len(budgets) == 1 else "",
        frontiers=[
            {"title": f.title, "svg": plots.frontier_plot(f), "best": "; ".join(p[0] for p in f.points if p[3])}
            for f in trade_offs
        ],
        needles=needles,
        needle_trials=trials.pop() if len(trials) == 1 else "several",
        latency=_latency(load_documents),
        stage_headings=STAGE_HEADINGS,
        stages=[_stage(name, s) for name, d in load_documents for s in d["stages"]],
        kv_benches=[_kv_bench(d) for _, d in inputs.kv_benches],
        recipes=[_recipe(p, d) for p, d in inputs.recipes],
        environments=_environments(inputs),
        sources=[
            str(p) for kind in (inputs.evals, inputs.loadtests, inputs.kv_benches, inputs.recipes) for p, _ in kind
        ],
        skipped=inputs.skipped,
        notes=notes,
    )


def _cell(text: str, sub: str = "") -> Cell:
    return {"text": text, "sub": sub}


def _estimate(value: Document | None, form: str) -> Cell:
    if value is None:
        return DASH
    error = value.get("standard_error")
    return _cell(form.format(value["value"]), f"± {form.format(error)}" if error is not None else "")


def _row(row: Row) -> list[Any]:
    perplexity = _estimate(row.perplexity, "{:.3f}")
    if row.perplexity_change is not None:
        perplexity = _cell(perplexity["text"], f"{row.perplexity_change['value']:+.2%}")
    needle = DASH
    if row.needle is not None:
        n = row.needle
        needle = _cell(f"{n['value']:.1%}", f"{n['low']:.0%} to {n['high']:.0%}" if n.get("low") is not None else "")
    load = row.load
    per_token = "" if row.kv_bytes_per_token is None else f"{row.kv_bytes_per_token:,.0f} B/token"
    return [
        row.name + (" (baseline)" if row.is_baseline else ""),
        DASH if row.weight_bits is None else _cell(f"{row.weight_bits:.2f}"),
        DASH if row.kv_bits is None else _cell(f"{row.kv_bits:.2f}", per_token),
        DASH if row.weight_bytes is None else _cell(readable(row.weight_bytes)),
        DASH if row.kv_tokens is None else _cell(f"{row.kv_tokens:,}"),
        perplexity,
        _cell("0", "reference") if row.is_baseline else _estimate(row.kl, "{:.5f}"),
        _cell("1", "reference") if row.is_baseline else _estimate(row.top1, "{:.4f}"),
        needle,
        DASH if load is None else _cell(_pair(load["ttft_p50_ms"], load["ttft_p95_ms"]), f"at {load['stage']}"),
        DASH if load is None else _cell(_pair(load["tpot_p50_ms"], load["tpot_p95_ms"])),
        DASH if load is None else _cell(
            f"{load['output_tokens_per_s']:,.0f}", f"{load['failed']} failed" if load["failed"] else ""
        ),
        DASH if row.step_ratio is None else _cell(f"{row.step_ratio:.2f}x", f"at {row.step_point}"),
    ]  # fmt: skip


def _pair(a: float | None, b: float | None) -> str:
    return NONE if a is None or b is None else f"{_ms(a)} / {_ms(b)}"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _load_name(document: Document, rows: list[Row], path: Path) -> str:
    """Return the configuration that a load test belongs to, as the table calls it."""
    for row in rows:
        if str(path) in row.sources:
            return row.name
    return str(document["label"])


def _cells(inputs: Inputs) -> list[Document]:
    return [
        cell
        for _, document in inputs.evals
        for entry in document["configurations"]
        if entry["needle"]
        for cell in entry["needle"]["cells"]
    ]


def _needles(inputs: Inputs, rows: list[Row]) -> list[dict[str, Any]]:
    """Return a heat map for each configuration, its worst cell deciding nothing but its own colour."""
    maps: dict[str, dict[str, Any]] = {}
    names = {(row.fingerprint, row.kv_cache_dtype): row.name for row in rows}
    for _, document in inputs.evals:
        for entry in document["configurations"]:
            if not entry["needle"]:
                continue
            cells = {(c["length"], c["depth"]): float(c["accuracy"]["value"]) for c in entry["needle"]["cells"]}
            depths = sorted({depth for _, depth in cells})
            lines = [
                (f"{length:,}", [_heat(cells.get((length, depth))) for depth in depths])
                for length in sorted({length for length, _ in cells})
            ]
            key = (entry["model"].get("fingerprint") or entry["model"]["name"], plain_dtype(entry["kv_cache"]["dtype"]))
            name = names.get(key, str(entry["name"]))
            maps[name] = {"name": name, "depths": [f"{d:.0%}" for d in depths], "lines": lines}
    return list(maps.values())


def _heat(value: float | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"text": f"{value:.0%}", "alpha": f"{0.04 + 0.5 * value**2:.2f}", "low": value < 0.9}


def _latency(documents: list[tuple[str, Document]]) -> list[dict[str, str]]:
    made = []
    for key, title in (("ttft_ms", "Time to first token"), ("tpot_ms", "Time per output token")):
        lines = [
            (f"{name}, {stage_label(stage)}", stage["latency"][key])
            for name, document in documents
            for stage in document["stages"]
            if stage["latency"][key]
        ]
        if lines:
            made.append({"title": title, "svg": plots.percentile_plot(title, "ms", lines)})
    sweep = plots.sweep_plot(documents)
    if sweep:
        made.append({"title": "Throughput against P95 time to first token", "svg": sweep})
    return made


def _stage(name: str, stage: Document) -> list[str]:
    def values(key: str) -> list[str]:
        d = stage["latency"][key]
        return [_ms(d[p]) for p in ("p50", "p95", "p99")] if d else [NONE] * 3

    rates = stage["throughput"]
    return [
        f"{name}, {stage_label(stage)}",
        str(stage["requests"]["ok"] + stage["requests"]["failed"]),
        str(stage["requests"]["failed"]),
        *values("ttft_ms"),
        *values("tpot_ms"),
        f"{rates['output_tokens_per_s']:,.1f}" if rates else NONE,
        f"{rates['requests_per_s']:,.2f}" if rates else NONE,
    ]


def _kv_bench(document: Document) -> dict[str, Any]:
    points = [p for entry in document["dtypes"] for p in entry["points"]]
    grid = sorted({(p["batch"], p["context"]) for p in points})
    rounds = max((p["step_ms"]["n"] for p in points), default=0)
    headings = ["KV-cache dtype", "KV tokens"]
    for batch, context in grid:
        headings += [f"{batch} x {context:,}: ms/step", "speed", "prefill tokens/s", "speed"]
    rows = []
    best = {point: max(p["step_ratio"] or 0 for p in points if (p["batch"], p["context"]) == point) for point in grid}
    for entry in document["dtypes"]:
        if entry["error"]:
            rows.append([entry["kv_cache_dtype"], _cell(f"not measured: {entry['error']}"[:90])])
            continue
        found = {(p["batch"], p["context"]): p for p in entry["points"]}
        ratio = entry["capacity_ratio"]
        cache = entry["kv_cache"]
        row: list[Any] = [
            plain_dtype(entry["kv_cache_dtype"]),
            _cell(f"{cache['tokens']:,}", f"{ratio:.2f}x" if ratio else "") if cache else DASH,
        ]
        for point in grid:
            p = found.get(point)
            if p is None:
                row += [DASH] * 4
                continue
            row += [
                _spread(p["step_ms"], "{:.2f}"), _ratio(p["step_ratio"], best[point]),
                _spread(p["prefill_tokens_per_s"], "{:,.0f}"), _ratio(p["prefill_ratio"], None),
            ]  # fmt: skip
        rows.append(row)
    baseline = plain_dtype(document["baseline"])
    return {
        "title": short_model(document["model"]),
        "headings": headings,
        "rows": rows,
        "rounds": rounds,
        "baseline": baseline,
    }


def _spread(value: Document, form: str) -> Cell:
    return _cell(form.format(value["median"]), f"{form.format(value['low'])} to {form.format(value['high'])}")


def _ratio(value: float | None, best: float | None) -> dict[str, Any]:
    if value is None:
        return dict(DASH)
    return {"text": f"{value:.2f}x", "sub": "", "best": best is not None and value == best and value > 1}


def _recipe(path: Path, document: Document) -> dict[str, str]:
    recipe = document["recipe"]
    steps = recipe.get("steps") or []
    names = " + ".join(" ".join(str(s[k]) for k in ("method", "bits") if k in s) for s in steps if isinstance(s, dict))
    data = document.get("calibration") or {}
    calibration = (
        f"{data['num_samples']} x {data['length']} tokens, {data['source']}" if data.get("num_samples") else "none"
    )
    return {
        "folder": path.parent.name, "model": str(document["model"]),
        "recipe": names or str(recipe.get("name", NONE)), "calibration": calibration,
    }  # fmt: skip


def _environments(inputs: Inputs) -> list[list[tuple[str, str]]]:
    """Return what results were measured with, each distinct machine and set of versions once."""
    made: list[list[tuple[str, str]]] = []
    for kind, documents in (
        ("quality", inputs.evals),
        ("KV-cache speed", inputs.kv_benches),
        ("load", inputs.loadtests),
    ):
        for path, document in documents:
            lines = [("measured", f"{kind} ({path.name})")]
            for key, value in (document.get("environment") or {}).items():
                text = (
                    ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
                    if isinstance(value, dict)
                    else _plain(value)
                )
                lines.append((key, text))
            if not any(lines[1:] == other[1:] and lines[0] == other[0] for other in made):
                made.append(lines)
    return made


def _plain(value: Any) -> str:
    if value is None:
        return "unknown"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
