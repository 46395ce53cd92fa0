"""A real Prometheus for tests: its binary, and a server that scrapes with the deployment's own settings."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from loadtest.deploy.panels import PANELS, filled
from loadtest.deploy.prometheus_api import Line, Prometheus
from loadtest.errors import LoadTestError
from loadtest.results.output import RECORDS
from loadtest.results.records import Record, read_records

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "loadtest" / "deploy"


def binary(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``; fetched once where it is not installed.

    Skips the test where that is impossible, but not in CI, where a skipped test would never be missed.
    """
    if found := shutil.which(name):
        return found
    done = subprocess.run(
        [ROOT / "requirements/prometheus.sh"], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode == 0:
        return str(ROOT / "build/prometheus/usr/bin" / name)
    reason = f"no {name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'it could not be fetched'}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def prometheus(folder: Path, targets: Mapping[str, str], every: str = "1s") -> Iterator[tuple[Prometheus, str]]:
    """Run Prometheus on loopback, with the deployment's rules, and its jobs of these targets (``host:port``)."""
    program = binary("prometheus")
    settings = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": every, "evaluation_interval": every}
    jobs = [job for job in settings["scrape_configs"] if job["job_name"] in targets]
    assert {job["job_name"] for job in jobs} == set(targets)
    for job in jobs:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
        job["scrape_interval"] = every
    settings["scrape_configs"] = jobs
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
    for group in rules["groups"]:
        group["interval"] = every
    folder.mkdir()
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    url = f"http://127.0.0.1:{free_port()}"
    words = [
        program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}", "--log.level=warn",
    ]  # fmt: skip
    with (folder / "log").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            server = Prometheus(url)
            for _ in range(300):
                # It answers seconds before it looks for its targets for the first time; 'up' is there from then on.
                with contextlib.suppress(LoadTestError):
                    if len(server.instant("up")) == len(targets):
                        break
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield server, url
        finally:
            process.terminate()
            process.wait(20)


def seen(lines: list[Line]) -> bool:
    """Whether a panel with these lines shows anything: a number at some moment."""
    return any((line.values == line.values).any() for line in lines)


def load(url: str, port: int, out: Path, *words: str) -> list[Record]:
    """Run ``pareto loadtest`` with its exporter on ``port``; return its measured records."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_ext.cli", "loadtest", "--base-url", url, "--exporter-port", str(port)),
            *("--no-progress", "--label", "tried", "--out", str(out), *words),
        ],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert "closed before" not in done.stderr, "Prometheus did not fetch the last values"
    return [record for record in read_records(out / RECORDS) if not record.warmup]


def exact(records: list[Record], name: str) -> np.ndarray:
    """What was measured, in seconds, as the board's histogram of that name counts it."""
    good = [record for record in records if record.outcome == "ok"]
    if name == "time_to_first_token_seconds":
        return np.array([record.first_token_s for record in good])
    if name == "time_per_output_token_seconds":
        return np.array([record.tpot_s for record in good if record.tpot_s is not None])
    assert name == "e2e_request_latency_seconds"
    return np.array([record.end_s for record in good])


LATENCIES = ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds")


def quantiles(title: str, side: str) -> list[tuple[float, str]]:
    """The quantiles that a panel shows of the client or the server, and their PromQL."""
    (panel,) = (panel for panel in PANELS if panel.title == title)
    found = [query for query in panel.queries if query.legend.startswith(f"{side} P")]
    assert len(found) == 2
    return [(float(query.legend.split()[1].removeprefix("P")) / 100, query.expr) for query in found]


TITLES = dict(zip(LATENCIES, ("Time to first token", "Time per output token", "End to end"), strict=True))


def check_quantiles(server: Prometheus, records: list[Record], name: str, begin: float, end: float) -> None:
    """Compare the client's quantiles on the board, over the time from begin to end, with the exact ones."""
    values = exact(records, name)
    window = f"{end - begin:.0f}s"
    for level, expr in quantiles(TITLES[name], "client"):
        (shown,) = server.instant(filled(expr, window), end).values()
        # A quantile of few values may be any number between two of them.
        low, high = (np.quantile(values, level, method=method) for method in ("lower", "higher"))
        assert low * 0.95 <= shown <= high * 1.05, (name, level)
