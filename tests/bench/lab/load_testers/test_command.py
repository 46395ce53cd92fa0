"""The order of runs, going on where a file stopped, tables, and what is refused."""

import json
from pathlib import Path

import pytest

from bench.lab.load_testers import __main__ as command
from bench.lab.load_testers.load import CASES, LOADS, LONG
from bench.lab.load_testers.table import held, median, tables

ROOT = Path(__file__).parents[4]
SHORT = "16 users"


def record(per_request_ms=1.0, rate=None, error=2.0, complete=10):
    return {
        "command": "tool --flag", "exit_status": 0, "seconds": 3.0, "problem": None, "startup_s": 1.0,
        "cpu_startup_s": 0.5, "per_request_ms": per_request_ms, "per_chunk_us": per_request_ms * 10,
        "said": {"ok": 10, "failed": None, "output_tokens": 160},
        "error": {"ttft_p50_ms": error, "ttft_p95_ms": error + 1, "tpot_ms": 0.0},
        "truth": {
            "requests": 10, "complete": complete, "rate": rate, "uneven_p95_ms": 1.0, "output_tokens": 16 * complete
        },
    }  # fmt: skip


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The command with runs that take no time; returns a function of the flags, and the runs so far."""
    done = []

    def measure(tool, load, tools, tokenizer):
        done.append((tool.name, load))
        return record()

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "version", lambda tool, folder: "1.0")
    monkeypatch.setattr(command, "environment", lambda: {"commit": "abc"})
    out = tmp_path / "peers.json"
    return lambda *flags: command.main(["--out", str(out), *flags]), done, out


def test_tools_take_turns():
    runs = list(command.planned(2, ["a", "b"], [SHORT, "an outage of 2 s"]))
    assert runs == [
        (0, SHORT, "a"), (0, SHORT, "b"), (0, "an outage of 2 s", "a"), (0, "an outage of 2 s", "b"),
        (1, SHORT, "b"), (1, SHORT, "a"),
    ]  # fmt: skip


def test_loads_run_alone():
    case, other = list(CASES)[:2]
    runs = [(0, SHORT, "a"), (0, SHORT, "b"), (0, case, "a"), (0, case, "b"), (0, other, "a"), (1, SHORT, "a")]
    assert [len(batch) for batch in command.batches(runs)] == [1, 1, 2, 1, 1]


def test_the_same_command_goes_on(bench, capsys):
    run, done, out = bench
    assert run("--only", "pareto", "vllm", "--rounds", "1", "--loads", SHORT) == 0
    assert [name for name, _ in done] == ["pareto", "vllm"]
    assert run("--only", "pareto", "vllm", "--rounds", "2", "--loads", SHORT) == 0
    assert [name for name, _ in done] == ["pareto", "vllm", "vllm", "pareto"]
    # A tool that joins later has its own runs.
    assert run("--only", "aiperf", "--rounds", "1", "--loads", SHORT) == 0
    found = json.loads(out.read_text())
    assert len(found["runs"]) == 5
    assert set(found["tools"]) == {"pareto", "vllm", "aiperf"}
    # Once for all rounds.
    assert found["commands"] == {tool: {SHORT: "tool --flag"} for tool in ("pareto", "vllm", "aiperf")}
    assert not any("command" in run for run in found["runs"])
    assert f"| {SHORT} | +2.0 / +3.0 / +0.0 / - |" in out.with_suffix(".md").read_text()


def test_what_was_measured_with_something_else_is_left_alone(bench, monkeypatch, capsys):
    run, done, out = bench
    assert run("--only", "pareto", "--rounds", "1", "--loads", SHORT) == 0
    # The results themselves, when they are tracked, are a change of the checkout's.
    monkeypatch.setattr(command, "environment", lambda: {"commit": "abc+changes"})
    assert run("--only", "pareto", "--rounds", "1", "--loads", SHORT) == 0
    before = out.read_text()
    monkeypatch.setattr(command, "environment", lambda: {"commit": "def"})
    assert run("--only", "pareto", "--rounds", "2", "--loads", SHORT) == 2
    assert "another environment" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(command, "environment", lambda: {"commit": "abc"})
    monkeypatch.setattr(command, "version", lambda tool, folder: "2.0")
    assert run("--only", "pareto", "--rounds", "2", "--loads", SHORT) == 2
    assert "another tools" in capsys.readouterr().err.splitlines()[-1]
    assert (len(done), out.read_text()) == (1, before)


def test_an_interrupted_measurement_keeps_what_is_done(bench, monkeypatch, capsys):
    run, done, out = bench
    measured = command.measure

    def interrupted(*words):
        if len(done) == 2:
            raise KeyboardInterrupt
        return measured(*words)

    monkeypatch.setattr(command, "measure", interrupted)
    assert run("--only", "pareto", "--rounds", "3", "--loads", SHORT) == 130
    assert "goes on" in capsys.readouterr().err
    assert len(json.loads(out.read_text())["runs"]) == 2


def test_time_is_up(bench, capsys):
    run, done, _ = bench
    assert run("--only", "pareto", "--loads", SHORT, "--minutes", "1e-9") == 0
    assert not done
    assert "3 runs are left" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_known_before_the_first_run(bench, tmp_path, capsys):
    run, done, _ = bench
    (tmp_path / "file").touch()
    assert run("--only", "pareto", "--loads", SHORT, "--out", str(tmp_path / "file" / "peers.json")) == 2
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1]
    assert not done


@pytest.mark.parametrize("flags", [("--rounds", "0"), ("--minutes", "0")])
def test_bad_numbers_are_refused(bench, flags, capsys):
    run, done, out = bench
    assert run(*flags) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not done
    assert not out.exists()


def test_tools_that_are_not_there_are_said_with_how_to_install_them(tmp_path, capsys):
    out = tmp_path / "peers.json"
    assert command.main(["--tools", str(tmp_path), "--only", "guidellm", "aiperf", "--out", str(out)]) == 2
    left_out, _, last = capsys.readouterr().err.splitlines()
    assert "pip install guidellm==0.8.1" in left_out
    assert str(tmp_path) in left_out
    assert "no tool to run" in last
    assert not out.exists()


def test_the_tables_figures():
    runs = [
        *({"tool": "a", "load": SHORT, "round": i, **record(cost)} for i, cost in enumerate((1.0, 1.2, 9.0))),
        {"tool": "a", "load": LONG, "round": 0, **record(1.3)},
        {"tool": "a", "load": "20/s", "round": 0, **record(rate=20.1)},
        {"tool": "a", "load": "100/s", "round": 0, **record(rate=99.0)},
        {"tool": "a", "load": "300/s", "round": 0, **record(rate=250.0)},
        {"tool": "a", "load": "every 10th answer empty", "round": 0, **record(complete=9)},
        {"tool": "a", "load": "an outage of 2 s", "round": 0, **record()},
    ]
    assert median(runs, "a", SHORT, lambda run: run["per_request_ms"]) == 1.2
    assert held(runs, "a") == 100
    lines = tables(runs).splitlines()
    assert f"| {SHORT} | +2.0 / +3.0 / +0.0 / - |" in lines
    assert "| 300/s | 250.0/s, 1.0 ms |" in lines
    assert f"| CPU a request, ms: {SHORT} | 1.20 |" in lines
    assert f"| CPU a chunk, µs: {LONG} | 13 |" in lines
    assert "| highest rate that arrived | 100/s |" in lines
    assert "| requests counted / that came | 70 / 70 |" in lines
    assert "| every 10th answer empty | 10 ok, ? failed (true: 9 ok, 1 failed), exit 0 |" in lines
    counted = "10 ok, ? failed (true: 10 ok, 0 failed)"
    assert f"| an outage of 2 s | {counted}, TTFT P95 +3.0 ms, TPOT +0.0 ms, exit 0 |" in lines
    # What nobody was asked has no line.
    assert not any("1 user" in line for line in lines)


def test_a_run_without_a_request_is_in_no_table():
    none = {"tool": "a", "load": SHORT, "round": 0, "truth": None, "said": None, "error": {}, "exit_status": 1}
    assert tables([none]) == ""


def test_every_load_is_open_or_closed():
    for name, load in (LOADS | CASES).items():
        assert (load.users is None) != (load.rate is None), name


def test_the_tables_go_between_the_marks_of_a_page(bench, tmp_path, capsys):
    run, done, out = bench
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.MARK}old\n{command.MARK}after\n")
    assert run("--only", "pareto", "--rounds", "1", "--loads", SHORT, "--page", str(page)) == 0
    text = out.with_suffix(".md").read_text()
    assert "+2.0" in text
    assert page.read_text() == f"before\n{command.MARK}{text}{command.MARK}after\n"
    page.write_text("no marks\n")
    assert run("--only", "pareto", "--rounds", "2", "--loads", SHORT, "--page", str(page)) == 2
    assert "expected two lines" in capsys.readouterr().err.splitlines()[-1]
    assert (len(done), page.read_text()) == (1, "no marks\n")


def test_the_projects_page_has_the_tables_of_its_results():
    results = json.loads((ROOT / "results/loadtest-peers/peers.json").read_text())
    page = ROOT / "docs/loadtest.md"
    assert command.with_tables(page, tables(results["runs"])) == page.read_text(), "run with --page docs/loadtest.md"


def test_planted_failures_are_known():
    planted = {name: case.planted(105) for name, case in CASES.items()}
    assert list(planted.values()) == [10, 10, 21, 0, 0]
