"""``--find`` against the mock server, whose own log is the truth about what it could serve."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest import command
from loadtest.errors import LoadTestError
from loadtest.load.runner import run_load_test
from loadtest.mock_server import MockServer
from loadtest.results.console import search_line
from loadtest.results.schema import SearchResult, Summary
from loadtest.settings import load_settings

Factory = Callable[..., MockServer]


def run(url: str, out: Path, words: str) -> Summary:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    common = f"--base-url {url} --out {out} --no-progress --no-server-metrics --output-tokens 1"
    return run_load_test(load_settings(parser.parse_args([*common.split(), *words.split()])))


@pytest.mark.long  # test_search.py searches a simulated server.
def test_the_knee_of_a_server_is_found(mock_server: Factory, tmp_path: Path) -> None:
    slots = 4
    server = mock_server(ttft_ms=200, capacity=slots)
    words = "--find knee --duration 5 --arrival constant --find-users 24 --prompt-tokens 8"
    summary = run(server.url, tmp_path, words)
    found = summary.search
    assert found is not None
    assert found.stages == len(summary.stages) <= 8
    assert found.sustained is not None
    # What the slots could do on this machine at this time: timers fire late on a loaded one.
    times = sorted(
        served.ended_unix_s - served.started_unix_s
        for served in server.log.served
        if served.ended_unix_s and served.started_unix_s and served.token_unix_s
    )
    capacity = slots / times[len(times) // 2]
    assert found.sustained == pytest.approx(capacity, rel=0.1)
    assert json.loads((tmp_path / "summary.json").read_text())["search"]["sustained"] == found.sustained


def test_a_sweep_measures_between_one_user_and_many(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=200, capacity=4)
    words = "--find sweep --find-stages 3 --duration 2 --arrival constant --find-users 8 --prompt-tokens 8"
    summary = run(server.url, tmp_path, words)
    one, many, *rates = summary.stages
    assert (one.concurrency, many.concurrency) == (1, 8)
    assert one.throughput is not None
    assert many.throughput is not None
    # Four slots serve four times as much as one user asks for; timers fire late on a loaded machine.
    assert many.throughput.requests_per_s > 2 * one.throughput.requests_per_s
    assert len(rates) == 1
    assert rates[0].rate is not None
    assert rates[0].rate > 2 * one.throughput.requests_per_s
    assert summary.search is not None
    assert summary.search.goal == "sweep"


def test_a_stage_far_too_fast_is_cut_short_and_says_so(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=200, capacity=2)
    words = "--rate 40 --arrival constant --duration 60 --stop-over-saturation --prompt-tokens 8"
    summary = run(server.url, tmp_path, words)
    (stage,) = summary.stages
    assert summary.duration_s < 30
    assert not stage.finished
    assert any(note.startswith("over-saturated") for note in stage.notes)


def test_a_ramp_is_not_called_over_saturated(mock_server: Factory, tmp_path: Path) -> None:
    """What is in flight rises because the load does."""
    server = mock_server(ttft_ms=800)
    (stage,) = run(server.url, tmp_path, "--ramp 2/s:40/s:5s --stop-over-saturation --prompt-tokens 8").stages
    assert stage.finished
    assert not any("over-saturated" in note for note in stage.notes)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--find knee --rate 4", "leave out --rate"),
        ("--find knee --concurrency 4", "leave out --concurrency"),
        ("--find knee --ramp 1:4:5s", "leave out --ramp"),
        ("--find knee --steps 4:5", "leave out --steps"),
        ("--find knee --requests 4", "give --duration"),
        ("--find max-rate", "needs limits: --goodput"),
        ("--find sweep --rate 4", "leave out --rate"),
        ("--find sweep --find-stages 2", "--find-stages 2"),
        ("--find knee --find-stages 2", "--find-stages 2"),
        ("--find knee --find-tolerance 0", "--find-tolerance 0"),
        ("--find knee --find-attainment 1.5", "--find-attainment 1.5"),
        ("--find knee --find-users 0", "--find-users 0"),
    ],
)
def test_what_contradicts_a_search_is_refused(tmp_path: Path, words: str, why: str) -> None:
    with pytest.raises(LoadTestError, match=why) as error:
        run("http://127.0.0.1:9", tmp_path, words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (SearchResult("knee", 39.2, 40.8, 3, True), "knee: 39.2 requests/s (40.8 was not sustained), in 3 stages"),
        (SearchResult("knee", 39.2, None, 8, False), "at least 39.2"),
        (SearchResult("knee", None, 2.0, 8, False), "not even 2 requests/s"),
        (SearchResult("max-rate", 1.0, 2.0, 8, False), "--find-stages"),
        (
            SearchResult("max-rate", 28.0, 34.0, 6, True, 0, 32.13),
            "32.13 requests/s (by a line through all stages",
        ),
        (SearchResult("knee", 39.2, 40.8, 3, True, 2), "3 stages, of which 2 invalid"),
    ],
)
def test_what_was_found_is_said_in_a_sentence(found: SearchResult, says: str) -> None:
    assert says in search_line(found)
