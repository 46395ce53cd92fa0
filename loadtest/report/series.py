"""What happened when: series over the time of a run, of its requests and of its server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.comparison.side import Run
from loadtest.results.energy import POWER
from loadtest.results.output import SERVER_METRICS
from loadtest.results.server_samples import merged, read_samples
from loadtest.statistics.samples import Floats

_BINS = 80
_GAUGES = (
    ("server, requests", ("vllm:num_requests_running", "running"), ("vllm:num_requests_waiting", "waiting")),
    ("GPU power, W", (POWER, "all GPUs")),
    ("cache, %", ("vllm:kv_cache_usage_perc", "KV cache used"),),
)  # fmt: skip
_HITS, _QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


@dataclass(frozen=True)
class Line:
    """One series; ``style`` is matplotlib's drawstyle."""

    name: str
    x: Floats
    y: Floats
    style: str = "default"


@dataclass(frozen=True)
class Panel:
    """Series on one y axis; ``top`` is its end, None for what the data need."""

    title: str
    lines: tuple[Line, ...]
    top: float | None = None


def panels(run: Run) -> tuple[list[Panel], list[tuple[float, str]]]:
    """Return the panels of a run's time line, and (begin in seconds, index) of each of its stages."""
    stages = [samples for samples in run.samples.values() if len(samples)]
    if not stages:
        return [], []
    zero = min(float(samples.start[0]) for samples in stages)
    start, end, ok = (np.concatenate([getattr(s, name) for s in stages]) for name in ("start", "end", "ok"))
    start, end = start - zero, end - zero
    first = np.concatenate([s.start[s.quantities["ttft"].owner] - zero for s in stages])
    ttft = np.concatenate([s.quantities["ttft"].values for s in stages])
    tokens = np.concatenate([s.output_tokens for s in stages])
    edges = np.linspace(0, max(float(end.max()), 1e-3), _BINS + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    found = [
        Panel("TTFT, ms", tuple(_percentiles(first, ttft, edges, middle))),
        Panel("in flight", (_in_flight(start, end),)),
        Panel("requests/s", (
            Line("offered", middle, np.histogram(start, edges)[0] / width),
            Line("answered", middle, np.histogram(end[ok], edges)[0] / width),
            *([] if ok.all() else [Line("failed", middle, np.histogram(end[~ok], edges)[0] / width)]),
        )),
        Panel("tokens/s", (Line("output", middle, np.histogram(end, edges, weights=tokens)[0] / width),)),
    ]  # fmt: skip
    found += _server(list(read_samples(run.path / SERVER_METRICS)), zero, float(edges[-1]))
    return found, [
        (float(samples.start[0]) - zero, str(index)) for index, samples in run.samples.items() if len(samples)
    ]


def _percentiles(x: Floats, values: Floats, edges: Floats, middle: Floats) -> list[Line]:
    slot = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(middle) - 1)
    lines = []
    for p in (50, 95):
        y = np.full(len(middle), np.nan)
        for each in np.unique(slot):
            y[each] = np.percentile(values[slot == each], p)
        known = ~np.isnan(y)
        lines.append(Line(f"P{p}", middle[known], y[known]))
    return lines


def _in_flight(start: Floats, end: Floats) -> Line:
    times = np.concatenate([start, end])
    order = np.argsort(times, kind="stable")
    count = np.cumsum(np.concatenate([np.ones(len(start)), -np.ones(len(end))])[order])
    # A long run has more steps than the plot has room for.
    keep = np.unique(np.linspace(0, len(order) - 1, 1500).astype(int))
    return Line("requests", times[order][keep], count[keep], "steps-post")


def _server(samples: Sequence[dict[str, Any]], zero: float, end: float) -> list[Panel]:
    rows = [(s["unix_s"] - zero, merged(s["metrics"])) for s in samples if s.get("metrics") and "unix_s" in s]
    rows = [(x, values) for x, values in rows if 0 <= x <= end]
    found = []
    for title, *names in _GAUGES:
        lines = [line for metric, name in names for line in _gauge(rows, metric, name, 100 if "%" in title else 1)]
        if "%" in title:
            lines += _hit_rate(rows)
        if lines:
            found.append(Panel(title, tuple(lines), 100 if "%" in title else None))
    return found


def _gauge(rows: Sequence[tuple[float, dict[str, float]]], metric: str, name: str, factor: float) -> list[Line]:
    points = [(x, factor * values[metric]) for x, values in rows if metric in values]
    return [Line(name, *np.array(points).T)] if len(points) > 1 else []


def _hit_rate(rows: Sequence[tuple[float, dict[str, float]]]) -> list[Line]:
    """Which share of the tokens asked for between two samples was in the prefix cache."""
    points = [(x, values[_HITS], values[_QUERIES]) for x, values in rows if _HITS in values and _QUERIES in values]
    if len(points) < 2:
        return []
    x, hits, queries = np.array(points).T
    asked = np.diff(queries)
    known = asked > 0
    return [Line("prefix hits", x[1:][known], 100 * np.diff(hits)[known] / asked[known])] if known.any() else []
