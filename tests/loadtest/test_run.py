"""Whole runs against the mock server, in this process: Locust's runner, users, files and numbers."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import gevent
import pytest

from loadtest import command
from loadtest.errors import LoadTestError
from loadtest.load.runner import run_load_test
from loadtest.mock_server import MockServer
from loadtest.results.records import Record, read_records
from loadtest.results.schema import SCHEMA, Distribution, Summary
from loadtest.settings import load_settings

Factory = Callable[..., MockServer]
EARLY_MS, LATE_MS = 2, 60


def run(server: MockServer, out: Path, words: str) -> tuple[Summary, list[Record]]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    common = ["--base-url", server.url, "--out", str(out), "--no-progress", "--metrics-interval", "0.2"]
    summary = run_load_test(load_settings(parser.parse_args([*common, *words.split()])))
    return summary, list(read_records(out / "records.jsonl"))


def median(values: Distribution | None) -> float:
    assert values is not None
    return values.p50


def test_a_closed_loop_measures_the_planted_delays(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=200, itl_ms=20)
    summary, _ = run(server, tmp_path, "--concurrency 4 --requests 12 --output-tokens 11 --goodput ttft:5000")
    (stage,) = summary.stages
    assert (stage.requests.ok, stage.requests.failed, stage.finished) == (12, 0, True)
    latency = stage.latency
    assert latency.ttft_ms is not None
    assert latency.ttft_ms.min >= 200 - EARLY_MS
    assert latency.ttft_ms.p50 <= 200 + LATE_MS
    # A first token that is read late makes the ten gaps after it shorter.
    assert 20 - EARLY_MS - LATE_MS / 10 <= median(latency.tpot_ms) <= 20 + LATE_MS
    assert 20 - EARLY_MS - LATE_MS / 10 <= median(latency.itl_ms) <= 20 + LATE_MS
    assert 400 - EARLY_MS <= median(latency.e2e_ms) <= 400 + LATE_MS
    assert stage.tokens_per_chunk == 1.0
    assert stage.goodput is not None
    assert stage.goodput.fraction == 1.0
    assert stage.throughput is not None
    # Four users with 0.4 s a request cannot do more than ten a second.
    assert 1 <= stage.throughput.requests_per_s <= 10.1
    assert stage.throughput.output_tokens_per_s == pytest.approx(11 * stage.throughput.requests_per_s)
    assert stage.throughput.mean_in_flight == pytest.approx(4, abs=0.5)


def test_lengths_are_what_the_distributions_say(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server()
    words = "--requests 40 --concurrency 4 --prompt-tokens uniform:50:150 --output-tokens choice:3,7 --prefix-tokens 20"
    summary, records = run(server, tmp_path, words)
    assert {r.output_tokens for r in records} == {3, 7}
    assert all(r.prompt_tokens == r.requested_prompt_tokens for r in records)
    assert all(70 <= (r.prompt_tokens or 0) <= 170 for r in records)
    assert len({r.prompt_tokens for r in records}) > 10
    assert all(body["ignore_eos"] is True and body["stream_options"]["include_usage"] for body in server.requests)
    assert len({" ".join(body["prompt"].split()[:20]) for body in server.requests}) == 1
    assert len({body["prompt"] for body in server.requests}) == 40
    counts = summary.stages[0].prompt_tokens
    assert counts is not None
    assert counts.mean == counts.requested_mean


def test_a_seed_repeats_the_requests(mock_server: Factory, tmp_path: Path) -> None:
    server, bodies = mock_server(), []
    for number, seed in enumerate("112"):
        words = f"--requests 6 --concurrency 3 --prompt-tokens uniform:5:50 --output-tokens uniform:1:9 --seed {seed}"
        run(server, tmp_path / str(number), words)
        bodies.append(sorted(json.dumps(body) for body in server.requests))
        server.requests.clear()
    assert bodies[0] == bodies[1] != bodies[2]


def test_other_servers_are_not_sent_vllms_parameters(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(owner="somebody")
    run(server, tmp_path, "--requests 2 --endpoint chat")
    assert all("ignore_eos" not in body and "messages" in body for body in server.requests)


def test_an_open_loop_keeps_its_rate_and_charges_a_stall_to_the_server(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=20, itl_ms=1, stall_at_s=0.5, stall_s=1.0)
    words = "--rate 20 --arrival constant --requests 40 --output-tokens 2 --prompt-token-ids 1000"
    summary, records = run(server, tmp_path, words)
    starts = sorted(r.intended_unix_s for r in records)
    assert starts[-1] - starts[0] == pytest.approx(39 / 20, abs=0.001)
    ttft = summary.stages[0].latency.ttft_ms
    assert ttft is not None
    # Of 40 requests, those meant for the stalled second waited for its end: about 20, evenly from 1 s down to 0.
    # A closed loop of one user would have seen one slow request.
    waited = [r for r in records if (r.first_token_s or 0) > 0.1]
    assert 14 <= len(waited) <= 26
    assert 900 <= ttft.max <= 1000 + 20 + LATE_MS * 2
    assert ttft.p90 >= 600
    sent = sorted(r.intended_unix_s + (r.start_s or 0) for r in records)
    assert sent[-1] - sent[0] < 39 / 20 + 0.3, "requests must go on being sent during the stall"


def test_waiting_for_max_concurrency_is_latency(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=100)
    words = "--rate 100 --arrival constant --requests 8 --max-concurrency 1 --output-tokens 1"
    summary, records = run(server, tmp_path, words)
    stage = summary.stages[0]
    # Due within 0.07 s but served one after the other: the last waits for seven others.
    assert stage.latency.e2e_ms is not None
    assert stage.latency.e2e_ms.max >= 8 * 100 - 70 - EARLY_MS
    assert stage.latency.schedule_lag_ms is not None
    assert stage.latency.schedule_lag_ms.max >= 7 * 100 - 70 - EARLY_MS
    assert any("--max-concurrency" in note for note in stage.notes)
    assert all((r.first_token_s or 0) - (r.start_s or 0) <= 0.1 + LATE_MS / 1000 * 3 for r in records)


def test_poisson_arrivals_follow_the_seed(mock_server: Factory, tmp_path: Path) -> None:
    server, gaps = mock_server(), []
    for number in range(2):
        _, records = run(server, tmp_path / str(number), "--rate 50 --requests 20 --seed 3 --output-tokens 1")
        starts = sorted(r.intended_unix_s for r in records)
        gaps.append([b - a for a, b in pairwise(starts)])
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-5)
    assert max(gaps[0]) > 3 * min(gaps[0])


def test_warmup_runs_first_and_is_left_out(mock_server: Factory, tmp_path: Path) -> None:
    for name, load in (("closed", "--concurrency 3"), ("open", "--rate 40 --arrival constant")):
        server = mock_server(ttft_ms=30)
        summary, records = run(server, tmp_path / name, f"{load} --warmup 5 --requests 7 --output-tokens 2")
        warm, measured = [r for r in records if r.warmup], [r for r in records if not r.warmup]
        assert (len(warm), len(measured)) == (5, 7)
        assert max(r.intended_unix_s + r.end_s for r in warm) <= min(r.intended_unix_s for r in measured) + 0.001
        counts = summary.stages[0].requests
        assert (counts.ok, counts.warmup) == (7, 5)


def test_a_duration_ends_a_stage(mock_server: Factory, tmp_path: Path) -> None:
    for name, load in (("closed", "--concurrency 2"), ("open", "--rate 50 --arrival constant")):
        server = mock_server(ttft_ms=10)
        _, records = run(server, tmp_path / name, f"{load} --duration 0.8 --output-tokens 1")
        starts = [r.intended_unix_s for r in records]
        assert 0.5 <= max(starts) - min(starts) <= 0.801
        if name == "open":
            assert len(records) == 40


def test_a_sweep_gives_one_result_a_stage_with_prompts_of_its_own(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=50)
    summary, records = run(server, tmp_path, "--concurrency 1 4 --requests 8 --output-tokens 2")
    first, second = summary.stages
    assert [r.stage for r in records].count(0) == [r.stage for r in records].count(1) == 8
    assert first.throughput is not None
    assert second.throughput is not None
    assert first.throughput.mean_in_flight == pytest.approx(1, abs=0.3)
    assert second.throughput.mean_in_flight == pytest.approx(4, abs=1.2)
    assert len({body["prompt"] for body in server.requests}) == 16


def test_planted_failures_are_counted_apart(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(faults={"http_500": 4, "cut": 5, "error_event": 7})
    summary, _ = run(server, tmp_path, "--requests 20 --output-tokens 4")
    stage = summary.stages[0]
    # Of 1..20: 4, 8, 12, 16, 20 are http_500; 5, 10, 15 are cut; 7, 14 get the error event.
    assert stage.failures == {"http_5xx": 5, "stream_cut": 3, "stream_error": 2}
    assert (stage.requests.ok, stage.requests.failed) == (10, 10)
    assert stage.failure_examples["stream_error"] == "planted error event"
    assert stage.latency.ttft_ms is not None
    assert stage.latency.ttft_ms.count == 10


def test_users_of_a_server_that_has_gone_do_not_spin(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(faults={"reset": 1})
    summary, _ = run(server, tmp_path, "--concurrency 2 --duration 1")
    assert 2 <= summary.stages[0].failures["connection_error"] <= 22


def test_the_summary_file_is_the_schema(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=100, itl_ms=10)
    words = "--requests 6 --concurrency 2 --warmup 3 --output-tokens 30 --label int4 --api-key sk-secret --seed 5"
    summary, _ = run(server, tmp_path, words)
    text = (tmp_path / "summary.json").read_text()
    document = json.loads(text)
    assert document == json.loads(json.dumps(summary.to_dict()))
    assert document["schema"] == SCHEMA == "vllm-pareto/loadtest/1"
    assert (document["label"], document["status"], document["settings"]["seed"]) == ("int4", "complete", 5)
    assert document["server"]["cache_config"]["cache_dtype"] == "auto"
    assert document["environment"]["packages"]["locust"]
    assert "secret" not in text
    metrics = document["stages"][0]["server_metrics"]
    assert metrics["vllm:num_requests_running"]["peak"] == 2
    assert metrics["vllm:generation_tokens_total"]["delta"] == 180
    assert 0 < metrics["vllm:kv_cache_usage_perc"]["peak"] <= 0.02
    assert document["generator"]["loop_lag_ms"]["count"] > 10


def test_existing_results_are_kept_unless_asked_otherwise(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server()
    run(server, tmp_path, "--requests 2 --label first")
    with pytest.raises(LoadTestError, match=r"exists; give another directory or --overwrite"):
        run(server, tmp_path, "--requests 3 --label second")
    assert json.loads((tmp_path / "summary.json").read_text())["label"] == "first"
    summary, records = run(server, tmp_path, "--requests 3 --label second --overwrite")
    assert (summary.label, len(records)) == ("second", 3)


def test_a_port_in_use_stops_before_anything_is_written(mock_server: Factory, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with pytest.raises(LoadTestError, match="in use"):
            run(mock_server(), tmp_path / "out", f"--exporter-port {port}")
    assert not (tmp_path / "out").exists()


def test_the_exporter_serves_until_the_last_values_were_scraped(mock_server: Factory, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    texts = []

    def scrape() -> None:
        while True:
            gevent.sleep(0.1)
            try:
                text = gevent.get_hub().threadpool.apply(
                    lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
                )
            except OSError:
                if texts:
                    return
                continue
            texts.append(text)

    scraper = gevent.spawn(scrape)
    server = mock_server(ttft_ms=100, itl_ms=10)
    words = f"--exporter-port {port} --concurrency 2 --requests 12 --output-tokens 10 --label tried --goodput ttft:5000"
    run(server, tmp_path, words)
    scraper.join()
    common = 'label="tried",model="mock-model"'
    last = texts[-1]
    assert re.search(rf'requests_total{{error="",{common},outcome="ok",run="[^"]+",stage="0"}} 12\.0', last)
    assert re.search(rf'target_concurrency{{{common},run="[^"]+",stage="0"}} 2\.0', last)
    assert re.search(rf'good_requests_total{{{common},run="[^"]+",stage="0"}} 12\.0', last)
    assert re.search(r"schedule_lag_seconds_count{.*} 12\.0", last)
    assert re.search(r"loop_lag_seconds_count{.*} [1-9]", last)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_ctrl_c_ends_the_wait_for_the_last_scrape_and_the_run_counts_as_complete(
    mock_server: Factory, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    out = tmp_path / "out"

    def interrupt() -> None:
        while not (out / "summary.json").exists():
            gevent.sleep(0.05)
        gevent.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    gevent.spawn(interrupt)
    words = f"--exporter-port {port} --exporter-linger 3600 --requests 3 --output-tokens 1"
    summary, _ = run(mock_server(), out, words)
    assert (summary.status, summary.stages[0].requests.ok) == ("complete", 3)


def test_every_run_sends_fresh_prompts_and_its_seed_repeats_them(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server()
    prompts: list[set[str]] = []
    seeds: list[int] = []
    words = "--requests 5 --warmup 3 --concurrency 1 2 --prompt-tokens 40 --output-tokens 1"
    for number in range(3):
        again = f" --seed {seeds[0]}" if number == 2 else ""
        summary, _ = run(server, tmp_path / str(number), words + again)
        seeds.append(summary.settings["seed"])
        prompts.append({body["prompt"] for body in server.requests})
        server.requests.clear()
    assert seeds[0] != seeds[1]
    assert len(prompts[0] | prompts[1]) == 32
    assert prompts[2] == prompts[0]


def test_users_that_are_told_to_slow_down_do(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(faults={"http_429": 1})
    summary, _ = run(server, tmp_path, "--concurrency 2 --duration 1.5 --output-tokens 1")
    assert set(summary.stages[0].failures) == {"http_429"}
    assert len(server.requests) <= 4


def in_flight_at(records: list[Record], seconds: float) -> int:
    moment = min(r.intended_unix_s for r in records) + seconds
    return sum(r.intended_unix_s <= moment < r.intended_unix_s + r.end_s for r in records)


def test_steps_of_users_send_with_their_numbers_and_cancel_nothing(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=100)
    summary, records = run(server, tmp_path, "--steps 1:1 4:1 2:1 --output-tokens 1")
    (stage,) = summary.stages
    assert (stage.shape, stage.profile, stage.concurrency) == ("steps", "1:1 4:1 2:1", 4)
    assert (stage.requests.cancelled, stage.requests.failed, stage.finished) == (0, 0, True)
    # Between the answers of a user there is a moment with one less.
    for begin, users in ((0, 1), (1, 4), (2, 2)):
        seen = [in_flight_at(records, begin + 0.3 + 0.01 * step) for step in range(60)]
        assert max(seen) == users
    assert [len(server.log.served)] == [stage.requests.ok]


def test_a_ramp_of_rates_starts_requests_when_its_integral_says(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=5)
    words = "--ramp 2/s:38/s:2s --arrival constant --output-tokens 1"
    summary, records = run(server, tmp_path, words)
    starts = sorted(r.intended_unix_s for r in records)
    assert len(starts) == 40
    for number, start in enumerate(starts):
        elapsed = start - starts[0]
        assert 2 * elapsed + 9 * elapsed**2 == pytest.approx(number, abs=1e-3)
    assert summary.stages[0].rate == 38


def test_a_trace_is_sent_on_its_times(mock_server: Factory, tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.1, 0.9, 1.0]
    rows = [
        {"timestamp": round(1000 * time), "input_length": 20, "output_length": 1, "hash_ids": [n]}
        for n, time in enumerate(times)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = f"--base-url {mock_server().url} --out {tmp_path / 'out'} --no-progress --trace {trace} --trace-speed 2"
    summary = run_load_test(load_settings(parser.parse_args(words.split())))
    starts = [r.intended_unix_s for r in sorted(read_records(tmp_path / "out/records.jsonl"), key=lambda r: r.index)]
    assert [start - starts[0] for start in starts] == pytest.approx([time / 2 for time in times], abs=1e-3)
    (stage,) = summary.stages
    assert (stage.mode, stage.shape, stage.rate, stage.requests.ok) == ("open", "trace", 10.0, 5)
