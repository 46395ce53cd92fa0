"""``pareto loadtest`` as a user runs it: in a process of its own, with its exit status and its messages."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest.mock_server import MockServer
from loadtest.results.records import read_records

Factory = Callable[..., MockServer]
PARETO = [sys.executable, "-m", "vllm_ext.cli", "loadtest"]


def pareto(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PARETO, *words], capture_output=True, text=True, timeout=60, check=False)


def test_a_run_prints_its_table_and_leaves_its_files(mock_server: Factory, tmp_path: Path) -> None:
    server, out = mock_server(ttft_ms=20, itl_ms=2), tmp_path / "out"
    words = f"--base-url {server.url}/v1 --out {out} --concurrency 1 2 --requests 4 --output-tokens 3"
    done = pareto(*words.split(), "--goodput", "e2el:9999")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for expected in ("mock-model", "1 user", "2 users", "TTFT", "TPOT", "P95", "100%", str(out / "summary.json")):
        assert expected in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "records.jsonl",
        "summary.json",
        "server_metrics.jsonl",
        "run.json",
    }


def test_settings_from_a_yaml_file(mock_server: Factory, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    lines = [
        "concurrency: [1, 3]",
        "requests: 3",
        "ignore-eos: false",
        "prompt-tokens: uniform:5:9",
        "output-tokens: 2",
    ]
    config.write_text("\n".join([*lines, "goodput: [ttft:500]", f"base-url: {mock_server().url}"]))
    done = pareto("--config", str(config), "--out", str(tmp_path / "out"), "--requests", "2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [stage["concurrency"] for stage in summary["stages"]] == [1, 3]
    assert (summary["settings"]["requests"], summary["settings"]["ignore_eos"]) == (2, False)


def test_bad_input_is_one_line_and_status_2(mock_server: Factory, tmp_path: Path) -> None:
    url = mock_server().url
    for words, why in (
        (f"--base-url {url} --model nobody", "does not serve 'nobody'; it serves: mock-model"),
        ("--base-url http://127.0.0.1:9", "nothing listens at http://127.0.0.1:9"),
        (f"--base-url {url} --prompt-tokens uniform:9", "--prompt-tokens uniform:9"),
    ):
        done = pareto(*words.split(), "--out", str(tmp_path / "out"))
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("pareto loadtest: error: ")
        assert why in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_without_any_success_is_status_1_with_its_report(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(faults={"http_503": 1})
    done = pareto("--base-url", server.url, "--out", str(tmp_path), "--requests", "3")
    assert done.returncode == 1
    assert "3 failed as http_5xx, for example: HTTP 503: planted http_503" in done.stdout
    assert "no request succeeded" in done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["stages"][0]["failures"] == {"http_5xx": 3}


def test_many_failures_are_status_1_without_a_flag(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(faults={"http_503": 3})
    words = ("--base-url", server.url, "--requests", "12")
    done = pareto(*words, "--out", str(tmp_path / "strict"))
    assert done.returncode == 1
    assert "1 user: 4 of 12 requests failed (33.3%), more than --max-error-rate 0.05 allows\n" in done.stderr
    assert pareto(*words, "--out", str(tmp_path / "lax"), "--max-error-rate", "0.5").returncode == 0


@pytest.mark.parametrize("load", ["--concurrency 2 1", "--rate 200 100"])
def test_too_many_failures_stop_the_run_early(mock_server: Factory, tmp_path: Path, load: str) -> None:
    server = mock_server(faults={"http_503": 2})
    words = f"--base-url {server.url} --requests 4000 {load} --max-error-rate 0.1 --out {tmp_path}"
    done = pareto(*words.split())
    assert done.returncode == 1
    assert "and the run was stopped" in done.stderr
    assert len(server.requests) < 400
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "stopped"
    (stage,) = summary["stages"]
    assert not stage["finished"]
    assert stage["requests"]["failed"] >= 2


@pytest.mark.parametrize("load", ["--concurrency 3", "--rate 30"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_what_it_measured(
    mock_server: Factory, tmp_path: Path, load: str, number: signal.Signals
) -> None:
    server = mock_server(ttft_ms=40, itl_ms=60)
    words = f"{load} --seed 0 --requests 100000 --output-tokens 8 --base-url {server.url} --out {tmp_path}"
    process = subprocess.Popen([*PARETO, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 40
        while len(server.requests) < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert "TTFT" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    records = list(read_records(tmp_path / "records.jsonl"))
    (stage,) = summary["stages"]
    assert (summary["status"], stage["finished"]) == ("interrupted", False)
    assert stage["requests"]["ok"] == sum(r.outcome == "ok" for r in records) >= 3
    assert stage["requests"]["cancelled"] == sum(r.outcome == "cancelled" for r in records) >= 1
    assert stage["requests"]["failed"] == 0
    assert stage["latency"]["ttft_ms"]["min"] >= 38


def limited(limit: str, *words: str) -> subprocess.CompletedProcess[str]:
    shell = ["bash", "-c", f'ulimit {limit} && exec "$@"', "bash", *PARETO, *words]
    return subprocess.run(shell, capture_output=True, text=True, timeout=60, check=False)


def test_more_users_than_the_soft_limit_of_descriptors(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=500)
    words = f"--base-url {server.url} --concurrency 90 --requests 90 --output-tokens 1 --out {tmp_path}"
    done = limited("-Sn 64", *words.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "summary.json").read_text())["stages"][0]["requests"]["ok"] == 90


def test_descriptors_that_run_out_are_the_clients_fault(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=500)
    words = f"--base-url {server.url} --concurrency 90 10 --requests 100 --output-tokens 1 --out {tmp_path}"
    done = limited("-n 64", *words.split())
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "raise `ulimit -n`" in " ".join(done.stdout.split())
    first, second = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert set(first["failures"]) == {"client_error"}
    assert first["requests"]["ok"] >= 20
    assert second["requests"]["failed"] == 0


def test_help_teaches_and_needs_no_server() -> None:
    done = pareto("--help")
    assert done.returncode == 0
    for expected in ("Closed loop", "Open loop", "--goodput", "lognormal:MEDIAN:SIGMA", "mock_server", "127.0.0.1"):
        assert expected in done.stdout
