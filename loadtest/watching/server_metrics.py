"""The server's own ``vllm:`` and ``pareto_`` metrics, sampled beside the load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
from gevent.lock import Semaphore

from loadtest import clock
from loadtest.endpoint.client import Client, HTTPStatusError
from loadtest.results.schema import MetricSeries
from loadtest.results.server_samples import summarize_samples

PREFIXES = ("vllm:", "pareto_")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
# Buckets are most of the bytes and _created are constants; sums and counts say what a stage needs.
_LEFT_OUT = ("_bucket", "_created", "_info")


def parse_metrics(text: str, prefixes: tuple[str, ...] = PREFIXES) -> dict[str, float]:
    """Return sample name with labels -> value, for metrics whose names begin so: by default the project's and vLLM's.

    Deliberately not a full parser of the exposition format: it must take well under a millisecond, since it shares a
    core with the requests being timed.
    """
    samples = {}
    for line in text.splitlines():
        if not line.startswith(prefixes):
            continue
        name, _, value = line.rpartition("}") if "}" in line else line.partition(" ")
        key = name + "}" if "{" in line else name
        if key.partition("{")[0].endswith(_LEFT_OUT):
            continue
        try:
            samples[key] = float(value.split()[0])
        except (ValueError, IndexError):
            continue
    return samples


def cache_config(text: str) -> dict[str, str]:
    """Return the labels of ``vllm:cache_config_info``: cache dtype, block size, number of blocks and the like."""
    for line in text.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            return dict(_LABEL.findall(line))
    return {}


class Sampler:
    """Reads ``/metrics`` once an interval and appends each sample to a JSON Lines file.

    A line is ``{"unix_s": ..., "stage": ..., "metrics": {name: value}}``; stage -1 is warm-up and before. A failed read
    is a line with ``error`` instead of ``metrics``: it never disturbs the load.

    Args:
        client: the server's; None leaves its own metrics out.
        path: the file.
        interval: seconds between two samples.
        metrics_path: where the server has them.
        append: go on with the file of an earlier run.
        gpus: reads a dcgm-exporter's page as well.

    """

    def __init__(
        self,
        client: Client | None,
        path: Path,
        interval: float,
        metrics_path: str = "/metrics",
        append: bool = False,
        gpus: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self._gpus = gpus
        self._client = client
        self._interval = interval
        self._metrics_path = metrics_path
        self._file = path.open("a" if append else "w", encoding="utf-8")
        self._greenlet: gevent.Greenlet | None = None
        self._samples: dict[int, list[dict[str, float]]] = {}
        self._stage = -1
        self._one_at_a_time = Semaphore()

    def found(self) -> bool:
        """Whether any sample held metrics of vLLM or of this project."""
        return bool(self._samples)

    def enter(self, stage: int) -> None:
        """Attribute samples to ``stage`` from now on, and take its first one."""
        self._stage = stage
        self.sample()

    def start(self) -> None:
        """Begin sampling."""
        self._greenlet = gevent.spawn(self._run)

    def stop(self) -> None:
        """Stop sampling and close the file."""
        if self._greenlet is not None:
            self._greenlet.kill()
        self._file.close()

    def sample(self) -> None:
        """Take one sample now, for the present stage."""
        # One after the other, so that the last sample of a stage is what was read last.
        with self._one_at_a_time:
            self._sample()

    def _sample(self) -> None:
        line: dict[str, Any] = {"unix_s": round(clock.to_unix(clock.now()), 3), "stage": self._stage}
        for read in (self._read_server, self._gpus):
            try:
                if read is not None:
                    line["metrics"] = line.get("metrics", {}) | read()
            except (OSError, HTTPStatusError, ValueError) as error:
                line["error"] = str(error)[:200]
        if line.get("metrics"):
            self._samples.setdefault(int(line["stage"]), []).append(line["metrics"])
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()

    def _read_server(self) -> dict[str, float]:
        if self._client is None:
            return {}
        return parse_metrics(self._client.get(self._metrics_path, max(self._interval, 5.0)).decode("utf-8", "replace"))

    def leave(self) -> None:
        """Take the last sample of the present stage."""
        self.sample()
        self._stage = -1

    def series(self, stage: int) -> dict[str, MetricSeries]:
        """Return mean, peak and growth of every metric during a stage."""
        return summarize_samples(self._samples.get(stage, []))

    def _run(self) -> None:
        due = clock.now()
        while True:
            self.sample()
            due = max(due + self._interval, clock.now())
            gevent.sleep(due - clock.now())
