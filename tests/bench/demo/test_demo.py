import contextlib
import sys

import pytest

from bench.demo import demo as module
from bench.demo.demo import Demo, Size
from bench.server import Server
from kv_cache.errors import ParetoError

RESULTS = {"compress": "config.json", "eval": "eval.json", "loadtest": "summary.json"}


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A demo whose commands only write their results; returns it and the commands that ran."""
    ran = []

    def run(self, name, words):
        ran.append(words)
        if words[0] in RESULTS:
            from pathlib import Path

            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RESULTS[words[0]]).write_text("{}")

    @contextlib.contextmanager
    def serving(words, log):
        ran.append(["serve", *words])
        yield Server("http://127.0.0.1:1", log, 0)
        ran.append(["stopped"])

    monkeypatch.setattr(Demo, "_run", run)
    monkeypatch.setattr(module, "serving", serving)
    lines = []
    return Demo("ref-7m", tmp_path, ("int8_per_head", "int4_per_head"), Size(), lines.append), ran, lines


def value(words, flag):
    return words[words.index(flag) + 1]


def test_the_chain_serves_five_configurations_under_the_names_of_eval(chain, tmp_path):
    demo, ran, _ = chain
    assert demo.run() == tmp_path / "report.html"
    w4 = str(tmp_path / "ref-7m-w4")
    assert [(w[1], value(w, "--kv-cache-dtype")) for w in ran if w[0] == "serve"] == [
        ("ref-7m", "auto"), ("ref-7m", "int8_per_head"), ("ref-7m", "int4_per_head"),
        (w4, "auto"), (w4, "int4_per_head"),
    ]  # fmt: skip
    assert [value(w, "--label") for w in ran if w[0] == "loadtest"] == [
        "ref-7m, bf16 KV", "ref-7m, int8_per_head KV", "ref-7m, int4_per_head KV", "ref-7m-w4, bf16 KV",
        "ref-7m-w4, int4_per_head KV",
    ]  # fmt: skip
    assert [w[0] for w in ran][:3] == ["compress", "eval", "eval"]
    assert ran[-1][0] == "report"
    assert sum(w == ["stopped"] for w in ran) == 5


def test_finished_steps_are_not_repeated_and_changed_ones_are(chain):
    demo, ran, lines = chain
    demo.run()
    ran.clear()
    demo.run()
    assert [w[0] for w in ran] == ["report"]
    assert sum("done already" in line for line in lines) == 8
    (demo.out / "load-ref-7m-bf16" / "summary.json").unlink()
    ran.clear()
    demo.run()
    assert [w[0] for w in ran] == ["serve", "loadtest", "stopped", "report"]
    other = Demo("ref-7m", demo.out, demo.dtypes, Size(evaluate=("--num-windows", "1")), lines.append)
    ran.clear()
    other.run()
    assert [w[0] for w in ran] == ["eval", "eval", "report"]


def test_a_failing_command_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    demo = Demo("ref-7m", tmp_path, ("int4_per_head",), Size(), lambda line: None)
    with pytest.raises(ParetoError, match=r"pareto compress failed with status 1.*compress\.log"):
        demo.run()
    assert not (tmp_path / "state.json").exists()
