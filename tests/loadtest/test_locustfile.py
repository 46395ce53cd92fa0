"""The locustfile under the real ``locust`` command: headless, distributed, with shapes and with bad flags."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import loadtest
from loadtest.mock_server import MockServer
from loadtest.results.manifest import read_manifest
from loadtest.results.records import read_records

Factory = Callable[..., MockServer]
ROOM = Path(loadtest.__file__).parent
PARETO = [sys.executable, "-m", "vllm_ext.cli", "loadtest"]
LOCUST = [sys.executable, "-m", "locust", "-f", str(ROOM / "locustfile.py")]


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*LOCUST, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def locust(*words: str) -> tuple[int, str]:
    process = start(*words)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output


def test_headless_writes_records_and_summary(mock_server: Factory, tmp_path: Path) -> None:
    server, out = mock_server(ttft_ms=60, itl_ms=5), tmp_path / "out"
    words = f"--host {server.url} --headless -u 3 -r 3 -t 6s --output-tokens 4 --warmup-s 0.5 --out {out}"
    status, output = locust(*words.split(), "--only-summary")
    assert status == 0, output
    (stage,) = json.loads((out / "summary.json").read_text())["stages"]
    assert (stage["mode"], stage["concurrency"], stage["requests"]["failed"]) == ("closed", 3, 0)
    assert stage["requests"]["ok"] >= 6
    assert stage["requests"]["warmup"] >= 3
    assert stage["latency"]["ttft_ms"]["min"] >= 58
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest.driver, manifest.complete, manifest.stages[0].concurrency) == ("locust", True, 3)
    records = list(read_records(out / "records.jsonl"))
    finished = sum(record.outcome == "ok" for record in records)
    # Locust's own statistics count what ended, warm-up and all.
    aggregated = next(line for line in output.splitlines() if "Aggregated" in line)
    assert int(aggregated.split()[1]) == finished


def test_a_master_merges_the_records_of_its_workers(mock_server: Factory, tmp_path: Path) -> None:
    server, out = mock_server(ttft_ms=30), tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    workers = [start("--worker", "--master-port", str(port)) for _ in range(2)]
    words = f"--master --master-bind-port {port} --expect-workers 2 --expect-workers-max-wait 30 --headless"
    load = f"-u 2 -r 2 -t 5s --host {server.url} --request-rate 10 --arrival constant --output-tokens 2"
    try:
        status, output = locust(*words.split(), *load.split(), "--out", str(out), "--goodput", "ttft:9999")
        assert status == 0, output
        for worker in workers:
            worker.communicate(timeout=20)
    finally:
        for worker in workers:
            worker.kill()
    (stage,) = json.loads((out / "summary.json").read_text())["stages"]
    assert (stage["mode"], stage["rate"], stage["requests"]["failed"]) == ("open", 20.0, 0)
    assert stage["goodput"]["fraction"] == 1.0
    # No record is lost on the way: those that ended are all there, and each stream has requests of its own.
    ok = stage["requests"]["ok"]
    assert ok + stage["requests"]["cancelled"] == len(server.requests)
    assert ok >= 20
    assert len({body["prompt"] for body in server.requests}) == len(server.requests)


def test_steps_change_the_number_of_users_and_cancel_nothing(mock_server: Factory, tmp_path: Path) -> None:
    server, out = mock_server(ttft_ms=700), tmp_path / "out"
    status, output = locust(
        *f"--headless --host {server.url} --steps 1:1 4:2 1:2 --output-tokens 1 --out {out}".split()
    )
    assert status == 0, output
    assert "Shape test updating to 4 users" in output
    (stage,) = json.loads((out / "summary.json").read_text())["stages"]
    assert (stage["concurrency"], stage["shape"], stage["profile"]) == (4, "steps", "1:1 4:2 1:2")
    assert stage["requests"]["cancelled"] == 0
    assert stage["requests"]["ok"] == len(server.requests)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_together_keep_the_rate_and_the_number(mock_server: Factory, tmp_path: Path, workers: int) -> None:
    server, out = mock_server(ttft_ms=20), tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    load = "--rate 20 --arrival constant --requests 41 --output-tokens 1 --seed 5"
    words = f"--host {server.url} --headless {load} --out {out} --master-bind-port {port} --master-port {port}"
    status, output = locust(*words.split(), *(["--processes", str(workers)] if workers else []))
    assert status == 0, output
    summary = json.loads((out / "summary.json").read_text())
    (stage,) = summary["stages"]
    assert (stage["mode"], stage["rate"], stage["requests"]["ok"]) == ("open", 20.0, 41)
    assert stage["requests"]["cancelled"] == 0
    assert sorted(record.index for record in read_records(out / "records.jsonl")) == list(range(41))
    assert len({body["prompt"] for body in server.requests}) == 41
    # Workers begin a moment apart, as they prepare themselves.
    assert stage["throughput"]["offered_requests_per_s"] == pytest.approx(20, rel=0.25 if workers else 0.001)
    assert summary["generator"]["loop_lag_ms"]["count"] > 20


@pytest.mark.parametrize(
    ("limit", "status", "stopped"), [("0.2", 1, True), ("0.9", 0, False)], ids=["exceeded", "kept"]
)
def test_max_error_rate_ends_locust(
    mock_server: Factory, tmp_path: Path, limit: str, status: int, stopped: bool
) -> None:
    server, out = mock_server(ttft_ms=10, faults={"http_500": 2}), tmp_path / "out"
    words = f"--host {server.url} --headless --rate 20 --requests 80 --output-tokens 1 --out {out}"
    code, output = locust(*words.split(), "--max-error-rate", limit)
    assert code == status, output
    (stage,) = json.loads((out / "summary.json").read_text())["stages"]
    assert (stage["requests"]["ok"] + stage["requests"]["failed"] < 80) == stopped
    assert ("more than --max-error-rate" in output) == stopped


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--prompt-tokens gauss:1", "error: --prompt-tokens gauss:1: unknown distribution"),
        ("--steps 4", "error: --steps 4: 4: expected LEVEL:TIME"),
        ("--rate 3 --request-rate 3", "exclude each other"),
        ("--max-error-rate 2", "error: --max-error-rate 2: expected a fraction from 0 to 1"),
        ("--request-rate fast", "error: --request-rate fast: must be a number above 0"),
        ("", "cannot start: nothing listens at http://127.0.0.1:9"),
    ],
)
def test_bad_input_ends_locust_with_status_2(words: str, why: str) -> None:
    status, output = locust("--host", "http://127.0.0.1:9", "--headless", "-t", "5s", *words.split())
    assert status == 2
    assert why in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "load",
    ["", *(pytest.param(load, marks=pytest.mark.long) for load in ("--processes 2", "--request-rate 4 --processes 2"))],
)
def test_what_is_in_flight_at_the_end_is_awaited(mock_server: Factory, tmp_path: Path, load: str) -> None:
    server, out = mock_server(ttft_ms=900), tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = f"--host {server.url} --headless -u 4 -r 4 -t 5s --output-tokens 1 --out {out} --master-bind-port {port}"
    status, output = locust(*words.split(), *load.split(), "--master-port", str(port))
    assert status == 0, output
    (stage,) = json.loads((out / "summary.json").read_text())["stages"]
    assert stage["requests"]["cancelled"] == 0
    assert stage["requests"]["ok"] == len(server.requests) >= 4


@pytest.mark.parametrize(("load", "mode", "rate"), [("-u 3", "closed", None), ("-u 2 --request-rate 15", "open", 30.0)])
def test_a_killed_test_is_summarized_and_not_resumed(
    mock_server: Factory, tmp_path: Path, load: str, mode: str, rate: float | None
) -> None:
    server, out = mock_server(ttft_ms=100), tmp_path / "out"
    words = f"--host {server.url} --headless -r 3 -t 60s {load} --output-tokens 2 --out {out} --label dead"
    process = start(*words.split(), "--goodput", "ttft:5000")
    deadline = time.monotonic() + 60
    while len(server.requests) < 30 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    summarize, resume = (
        subprocess.run([*PARETO, flag, str(out)], capture_output=True, text=True, timeout=60, check=False)
        for flag in ("--summarize", "--resume")
    )
    assert summarize.returncode == 0, summarize.stderr
    assert "the run did not end; start it again with Locust" in summarize.stderr
    summary = json.loads((out / "summary.json").read_text())
    (stage,) = summary["stages"]
    assert (summary["status"], summary["label"], summary["server"]["model"]) == ("interrupted", "dead", "mock-model")
    assert (stage["mode"], stage["rate"], stage["concurrency"]) == (mode, rate, None if rate else 3)
    assert stage["requests"]["ok"] >= 20
    assert stage["goodput"]["fraction"] == 1.0
    assert (resume.returncode, len(resume.stderr.splitlines())) == (2, 1)
    assert "a test of Locust's" in resume.stderr


def test_the_exporter_waits_for_its_last_scrape(mock_server: Factory, tmp_path: Path) -> None:
    server, out = mock_server(ttft_ms=20), tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = f"--host {server.url} --headless -u 2 -r 2 -t 5s --output-tokens 2 --exporter-port {port} --label tried"
    process = start(*words.split(), "--out", str(out), "--only-summary")
    text = ""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page,
        ):
            text = page.read().decode()
        time.sleep(0.05)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "closed before" not in output
    ok = sum(record.outcome == "ok" for record in read_records(out / "records.jsonl"))
    labels = 'error="",label="tried",model="mock-model",outcome="ok",run="[^"]+",stage="0"'
    (count,) = re.findall(rf"pareto_loadtest_requests_total{{{labels}}} ([\d.]+)", text)
    assert float(count) == ok > 0


def test_ctrl_c_ends_the_wait_for_the_last_scrape(mock_server: Factory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = f"--host {mock_server().url} --headless -u 1 -r 1 -t 1s --output-tokens 2 --exporter-port {port}"
    process = start(*words.split(), "--exporter-linger", "3600", "--only-summary")
    assert process.stdout is not None
    try:
        seen = next(line for line in process.stdout if "exporter: waiting" in line)
        assert "3600 s at most; Ctrl-C ends it" in seen
        process.send_signal(signal.SIGINT)
        left, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in left
    assert process.returncode == 0
