"""``server_metrics.jsonl`` read back: the server's own metrics of each stage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.results.schema import MetricSeries


def merged(sample: dict[str, float]) -> dict[str, float]:
    """Return one value for each metric name: label sets are added up, ``*_perc`` gauges take their maximum."""
    values: dict[str, float] = {}
    for key, value in sample.items():
        name = key.partition("{")[0]
        if name not in values:
            values[name] = value
        else:
            values[name] = max(values[name], value) if name.endswith("_perc") else values[name] + value
    return values


def summarize_samples(samples: Iterable[dict[str, float]]) -> dict[str, MetricSeries]:
    """Reduce samples to one series per metric name, labels merged as in :func:`merged`."""
    collected: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in merged(sample).items():
            if np.isfinite(value):
                collected.setdefault(name, []).append(value)
    return {
        name: MetricSeries(len(v), float(np.mean(v)), max(v), v[0], v[-1], v[-1] - v[0])
        for name, v in sorted(collected.items())
    }


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a ``server_metrics.jsonl``; none when there is no such file.

    A line that is no JSON is passed over: a killed run leaves half a line, and samples are an aside to the records.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                sample = json.loads(line)
            except ValueError:
                continue
            if isinstance(sample, dict):
                yield sample


def read_series(path: Path) -> dict[int, dict[str, MetricSeries]]:
    """Return the series of every stage of a ``server_metrics.jsonl``."""
    by_stage: dict[int, list[dict[str, float]]] = {}
    for sample in read_samples(path):
        if sample.get("metrics") and sample.get("stage", -1) >= 0:
            by_stage.setdefault(int(sample["stage"]), []).append(sample["metrics"])
    return {stage: summarize_samples(samples) for stage, samples in by_stage.items()}
