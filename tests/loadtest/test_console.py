from __future__ import annotations

import io

import gevent
import pytest
from rich.console import Console

from loadtest.load import progress
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.results import console
from loadtest.results.records import Record
from loadtest.results.schema import Generator, Server, Summary
from loadtest.results.summary import summarize
from loadtest.stage_spec import StageSpec


def slow_summary() -> Summary:
    spec = StageSpec(0, rate=1234.5)
    times = [146_712.3, 298_765.4]
    items = [
        Record(0, i, False, 1e9 + i, 0.0, times[0], times[1], times[1], times, 9, 2, 9, 2, finish_reason="length")
        for i in range(3)
    ]
    server = Server("http://127.0.0.1:8000", "m", ["m"], None, True, {})
    stages = summarize(items, [spec], {"ttft": 1e12})
    return Summary("m", "complete", "", 1.0, {}, {}, server, {}, stages, Generator(None, 0.0), {})


@pytest.mark.parametrize("width", [40, 80])
def test_no_number_is_cut_on_a_narrow_terminal(width: int) -> None:
    out = io.StringIO()
    console.print_summary(slow_summary(), Console(file=out, width=width, markup=False, emoji=False))
    assert "…" not in out.getvalue()
    assert out.getvalue().count("146712300") == 12
    assert "298765400" in out.getvalue()


def test_without_a_terminal_a_line_says_now_and_then_what_is_in_flight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.02)
    spec, sink = StageSpec(0, concurrency=4, requests=8), Sink()
    sink.begin()
    for enabled in (True, False):
        with progress.Progress([spec], sink, enabled) as shown:
            shown.show(Stage(spec, 0))
            gevent.sleep(0.2)
        expected = "stage 1/1: 4 users: 0%, 0 ok, 0 failed, 1 in flight" if enabled else ""
        assert capsys.readouterr().err.partition("\n")[0] == expected
