"""Runs as a queue makes them: Poisson arrivals at one server, whose requests wait for each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from loadtest.results.records import Record
from loadtest.statistics.samples import Floats, Ragged, SampleCollector, Samples


def _queue(rng: np.random.Generator, n: int, load: float, slower: float) -> tuple[Floats, Floats]:
    """Starts and times to first token of ``n`` requests at 100/s, in seconds.

    The server is busy ``load`` of the time, and everything takes ``slower`` times as long.
    """
    gaps, work = rng.exponential(1.0, n), load * slower * rng.gamma(11.0, 1 / 11.0, n)
    # Lindley's recursion, as the distance of a random walk from its lowest point so far.
    walk = np.concatenate([[0.0], np.cumsum(work[:-1] - gaps[1:])])
    wait = walk - np.minimum.accumulate(walk)
    return np.cumsum(gaps) * 0.01, slower * 0.1 * rng.lognormal(0.0, 0.2, n) + wait * 0.01


def records(rng: np.random.Generator, n: int = 400, load: float = 0.5, slower: float = 1.0) -> list[Record]:
    found = []
    for i, (start, first) in enumerate(zip(*_queue(rng, n, load, slower), strict=True)):
        times = [float(first) + slower * 0.02 * k for k in range(3)]
        found.append(
            Record(
                0, i, False, 1000.0 + float(start), 0.0, times[0], times[-1], times[-1], times, 8, 3, 8, 3,
                finish_reason="length", status=200,
            )
        )  # fmt: skip
    return found


def run(rng: np.random.Generator, n: int = 400, load: float = 0.5, slower: float = 1.0) -> Samples:
    """The same as :func:`records`, but with times to first token only, and fast."""
    start, first = _queue(rng, n, load, slower)
    yes, nothing = np.ones(n, dtype=np.bool_), Ragged(np.empty(0), np.empty(0, dtype=np.int64))
    latency = Ragged(first * 1000, np.arange(n))
    found = {"ttft": latency, "e2e": latency, "tpot": nothing, "itl": nothing}
    return Samples(start, start + first, yes, yes, np.ones(n), found, False)


def samples(items: list[Record], slo: dict[str, float] | None = None) -> Samples:
    collector = SampleCollector(slo or {})
    for item in items:
        collector.add(item)
    return collector.samples()


def write(folder: Path, items: list[Record]) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(item.to_dict()) for item in items]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder
