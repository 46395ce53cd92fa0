"""Killed runs: what is left of them is summarized, and they can be gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.errors import LoadTestError
from loadtest.mock_server import MockServer
from loadtest.results.manifest import read_manifest
from loadtest.results.offline import open_folder, summarize_folder
from loadtest.results.records import read_records

Factory = Callable[..., MockServer]
PARETO = [sys.executable, "-m", "vllm_ext.cli", "loadtest"]


def pareto(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PARETO, *words], capture_output=True, text=True, timeout=60, check=False)


def killed(server: MockServer, out: Path, *words: str) -> None:
    """Run until a few requests of the second stage have ended, then kill -9."""
    common = ["--base-url", server.url, "--out", str(out), "--rate", "50", "20", "--requests", "20"]
    process = subprocess.Popen([*PARETO, *common, "--output-tokens", "3", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = (out / "records.jsonl").read_text().splitlines() if (out / "records.jsonl").exists() else []
        if sum('"stage":1' in line for line in lines) >= 4:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.fixture(scope="module")
def dead_run(tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("killed") / "out"
    with MockServer() as server:
        server.config.itl_ms = 2
        killed(server, out, "--label", "dead", "--goodput", "ttft:900", "--header", "X-Key: secret-value")
    return out


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_killed_run_is_summarized(dead_run: Path, tmp_path: Path) -> None:
    out = copy(dead_run, tmp_path / "out")
    assert not (out / "summary.json").exists()
    with (out / "records.jsonl").open("a") as file:
        file.write('{"stage":1,"index":9,"torn')
    done = pareto("--summarize", str(out))
    assert done.returncode == 0, done.stderr
    assert "dead: mock-model" in done.stdout
    assert "did not end" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    first, second = summary["stages"]
    assert (summary["status"], first["finished"], second["finished"]) == ("interrupted", True, False)
    assert (first["rate"], first["requests"]["ok"], second["rate"]) == (50, 20, 20)
    assert 4 <= second["requests"]["ok"] < 20
    assert first["goodput"]["fraction"] == 1.0
    assert first["server_metrics"]["vllm:num_requests_running"]["samples"] >= 1
    assert "secret-value" not in (out / "run.json").read_text()


def test_a_killed_run_goes_on(dead_run: Path, tmp_path: Path, mock_server: Factory) -> None:
    out = copy(dead_run, tmp_path / "out")
    before = [record for record in read_records(out / "records.jsonl") if record.stage == 0]
    lost = [record for record in read_records(out / "records.jsonl") if record.stage == 1]
    # The address belongs to the settings, so it is changed in the file.
    run = json.loads((out / "run.json").read_text())
    run["settings"]["base_url"] = mock_server(itl_ms=2).url
    (out / "run.json").write_text(json.dumps(run))
    refused = pareto("--resume", str(out))
    assert (refused.returncode, "give --header again for X-Key" in refused.stderr) == (2, True)
    refused = pareto("--resume", str(out), "--rate", "3", "--header", "X-Key: secret-value")
    assert (refused.returncode, "leave out --rate" in refused.stderr) == (2, True)
    done = pareto("--resume", str(out), "--header", "X-Key: secret-value")
    assert done.returncode == 0, done.stderr
    after = list(read_records(out / "records.jsonl"))
    assert [record for record in after if record.stage == 0] == before
    assert sorted(record.index for record in after if record.stage == 1) == list(range(20))
    assert list(read_records(out / "records.dropped.jsonl")) == lost
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert [stage["requests"]["ok"] for stage in summary["stages"]] == [20, 20]
    again = pareto("--resume", str(out), "--header", "X-Key: secret-value")
    assert (again.returncode, "all of its 2 stages have ended" in again.stderr) == (2, True)


def test_records_alone_are_enough(dead_run: Path, tmp_path: Path) -> None:
    out = copy(dead_run, tmp_path / "out")
    (out / "run.json").unlink()
    summary = summarize_folder(open_folder(out, "--summarize"))
    first, second = summary.stages
    assert first.requests.ok == 20
    assert second.requests.ok >= 4
    assert first.concurrency is not None
    done = pareto("--resume", str(out))
    assert (done.returncode, "no run.json" in done.stderr) == (2, True)


def test_a_whole_run_is_summarized_as_it_summarized_itself(mock_server: Factory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = f"--base-url {mock_server(itl_ms=1).url} --out {out} --concurrency 2 4 --requests 30 --output-tokens 4"
    assert pareto(*words.split(), "--goodput", "e2el:900").returncode == 0
    stored = json.loads((out / "summary.json").read_text())
    assert json.loads(json.dumps(summarize_folder(open_folder(out, "x")).to_dict())) == stored
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.complete
    # run.json is one that older versions lack: the summary says what the stages were.
    (out / "run.json").unlink()
    without = summarize_folder(open_folder(out, "x")).to_dict()
    assert json.loads(json.dumps(without["stages"])) == stored["stages"]


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    for words, why in (
        (["--summarize", str(tmp_path / "gone")], "no such folder"),
        (["--summarize", str(tmp_path)], "no records.jsonl in it"),
        (["--resume", str(tmp_path)], "no records.jsonl in it"),
        (["--summarize", "a", "--resume", "b"], "--summarize and --resume exclude each other"),
    ):
        done = pareto(*words)
        assert (done.returncode, len(done.stderr.splitlines()), why in done.stderr) == (2, 1, True), done.stderr
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(LoadTestError, match="nothing to summarize"):
        summarize_folder(open_folder(tmp_path, "x"))
    (tmp_path / "records.jsonl").write_text('not json\n{"stage":0,"index":0}\n')
    with pytest.raises(LoadTestError, match=r"records.jsonl:1 is not"):
        summarize_folder(open_folder(tmp_path, "x"))
    (tmp_path / "run.json").write_text('{"schema": "other"}')
    with pytest.raises(LoadTestError, match="expected the schema"):
        open_folder(tmp_path, "x")
