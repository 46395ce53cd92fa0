"""``--processes``: several processes send what one would, and what becomes of them is known."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gevent.event import Event

from loadtest import clock, command
from loadtest.errors import LoadTestError
from loadtest.load.counts import Counts, SharedCounts, share
from loadtest.load.order import Order
from loadtest.load.pool import ProcessLoad
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.mock_server import MockServer
from loadtest.results.records import read_records
from loadtest.results.schema import Server
from loadtest.settings import load_settings
from loadtest.stage_spec import StageSpec

Factory = Callable[..., MockServer]
PARETO = [sys.executable, "-m", "vllm_ext.cli", "loadtest", "--no-progress"]


def pareto(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PARETO, *words], capture_output=True, text=True, timeout=120, check=False)


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that send, without the one in which Python tracks semaphores."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def await_requests(server: MockServer, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(server.requests) < count:
        assert time.monotonic() < deadline, "no load came"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_things_are_shared_out_evenly_and_completely() -> None:
    assert [share(7, (i, 3)) for i in range(3)] == [3, 2, 2]
    assert [share(1, (i, 3)) for i in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("shared", [False, True], ids=["one", "shared"])
def test_users_of_several_stages_take_each_number_once(shared: bool) -> None:
    spec = StageSpec(concurrency=2, warmup=3, requests=5)
    counts = SharedCounts(2) if shared else Counts()
    # Two stages on the same counts stand for two processes, one of which has gone far ahead.
    first, second = (Stage(spec, 0, counts=counts) for _ in range(2))
    warm = [first.take(), first.take(), second.take()]
    assert [(ticket.index, ticket.warmup) for ticket in warm if ticket] == [(0, True), (1, True), (2, True)]
    for stage, ticket in zip((first, first, second), warm, strict=True):
        assert ticket is not None
        stage.done(ticket)
    taken = [stage.take() for stage in (first, second, first, first, second, first, second)]
    assert [ticket.index for ticket in taken if ticket] == [0, 1, 2, 3, 4]
    assert taken[5:] == [None, None]
    for ticket in taken[:5]:
        assert ticket is not None
        second.done(ticket)
    assert first.progress() == second.progress() == 1.0
    counts.begin_stage()
    assert (counts.sent, counts.ended, counts.warmups, counts.closed) == (0, 0, 0, False)
    first.closed = True
    assert second.exhausted()


def test_an_open_loop_is_the_same_from_one_process_and_from_several(mock_server: Factory, tmp_path: Path) -> None:
    seen = []
    for number in (1, 2):
        server, out = mock_server(ttft_ms=30, itl_ms=5), tmp_path / str(number)
        words = f"--base-url {server.url} --rate 40 --requests 41 --warmup 5 --output-tokens uniform:2:9 --seed 5"
        done = pareto(*words.split(), "--processes", str(number), "--out", str(out))
        assert done.returncode == 0, done.stderr
        records = list(read_records(out / "records.jsonl"))
        measured = sorted((r for r in records if not r.warmup), key=lambda r: r.index)
        begin = min(r.intended_unix_s for r in measured)
        assert [r.index for r in measured] == list(range(41))
        assert max(r.intended_unix_s + r.end_s for r in records if r.warmup) <= begin
        bodies = sorted(json.dumps(body) for body in server.requests)
        seen.append((bodies, [r.intended_unix_s - begin for r in measured]))
        summary = json.loads((out / "summary.json").read_text())
        assert summary["error"] is None
        assert summary["generator"]["loop_lag_ms"]["count"] > 20 * number
        assert summary["generator"]["cpu_percent"] > 0
        (stage,) = summary["stages"]
        assert (stage["requests"]["ok"], stage["requests"]["warmup"]) == (41, 5)
        assert stage["latency"]["ttft_ms"]["min"] >= 28
    assert seen[0][0] == seen[1][0]
    # Both processes count from one moment on one clock, so arrivals fit as if they came from one.
    assert seen[0][1] == pytest.approx(seen[1][1], abs=1e-5)


def test_users_of_a_closed_loop_are_split_and_stages_follow_each_other(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=120)
    words = "--concurrency 1 3 --requests 13 --warmup 4 --output-tokens 1 --processes 2 --metrics-interval 0.1"
    done = pareto(*words.split(), "--base-url", server.url, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    one, three = json.loads((tmp_path / "summary.json").read_text())["stages"]
    records = list(read_records(tmp_path / "records.jsonl"))
    for stage, users in ((one, 1), (three, 3)):
        own = [r for r in records if r.stage == stage["index"]]
        warm, measured = ([r for r in own if r.warmup == phase] for phase in (True, False))
        assert sorted(r.index for r in measured) == list(range(13))
        assert sorted(r.index for r in warm) == list(range(4))
        assert max(r.intended_unix_s + r.end_s for r in warm) <= min(r.intended_unix_s for r in measured)
        assert stage["server_metrics"]["vllm:num_requests_running"]["peak"] == users
    assert max(r.intended_unix_s + r.end_s for r in records if r.stage == 0) <= min(
        r.intended_unix_s for r in records if r.stage == 1
    )


def test_a_process_that_dies_ends_the_run_with_an_error_and_it_can_be_resumed(
    mock_server: Factory, tmp_path: Path
) -> None:
    server = mock_server(ttft_ms=20)
    words = f"--base-url {server.url} --rate 50 --requests 60 --output-tokens 1 --processes 2 --out {tmp_path}"
    process = subprocess.Popen([*PARETO, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        await_requests(server, 25)
        pids = children(process)
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert "error: load generator process 2 of 2 died (signal SIGKILL); the results above are partial" in line
    assert all(gone(pid) for pid in pids)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert "died" in summary["error"]
    assert summary["stages"][0]["finished"] is False
    assert 0 < summary["stages"][0]["requests"]["ok"] < 60
    resumed = pareto("--resume", str(tmp_path), "--processes", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["stages"][0]["requests"]["ok"] == 60


def test_ctrl_c_cancels_what_all_processes_have_in_flight(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=3_000)
    words = f"--base-url {server.url} --concurrency 5 --requests 50 --processes 2 --out {tmp_path}"
    process = subprocess.Popen(
        [*PARETO, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        await_requests(server, 5)
        # As a terminal does: every process of the group gets it.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.splitlines() == ["pareto loadtest: interrupted; the results above are partial"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["error"], summary["stages"][0]["requests"]["cancelled"]) == (
        "interrupted",
        None,
        5,
    )


def test_a_process_that_cannot_begin_stops_the_run_before_it(mock_server: Factory, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hello\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    request = load_settings(parser.parse_args(["--prompts", str(tmp_path / "prompts.txt")])).request
    # It was there when the parent looked.
    (tmp_path / "prompts.txt").unlink()
    url, counts, stop = mock_server().url, SharedCounts(1), Event()
    order = Order((0, 1), url, request, Server(url, "mock-model", [], None, True, {}), None, clock.anchor())
    with pytest.raises(LoadTestError, match=r"load generator process 1 of 1: .*prompts.txt"):
        ProcessLoad(order, counts, Sink(counts=counts), lambda _: None, stop)
    assert not multiprocessing.active_children()


@pytest.mark.long
def test_processes_end_when_their_parent_is_killed(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=20)
    words = f"--base-url {server.url} --rate 50 --duration 60 --output-tokens 1 --processes 2 --out {tmp_path}"
    process = subprocess.Popen(
        [*PARETO, *words.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        await_requests(server, 40)
        pids = children(process)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "they go on without it"
        time.sleep(0.05)
    assert any(read_records(tmp_path / "records.jsonl"))


@pytest.mark.long
def test_too_many_failures_stop_all_processes(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(faults={"http_503": 2})
    words = f"--base-url {server.url} --requests 4000 --rate 100 --max-error-rate 0.1 --processes 2 --out {tmp_path}"
    done = pareto(*words.split())
    assert done.returncode == 1
    assert "and the run was stopped" in done.stderr
    assert len(server.requests) < 1000
