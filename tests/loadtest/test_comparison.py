"""``--fail-if`` and ``--compare``, from their text to their exit status."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from loadtest.comparison.compare import FAILED, OPEN, PASSED, compare, judge_run
from loadtest.comparison.conditions import holm, parse_condition
from loadtest.comparison.side import read_side
from loadtest.errors import LoadTestError
from loadtest.mock_server import MockServer
from loadtest.results.manifest import Manifest
from loadtest.results.schema import Server
from tests.loadtest.simulated import records, write
from vllm_ext import cli

Factory = Callable[..., MockServer]


def pareto(*words: str) -> int:
    return cli.main(["loadtest", *words])


def test_conditions() -> None:
    absolute = parse_condition("p95_ttft > 0.5s")
    assert (absolute.figure.name, absolute.above, absolute.limit, absolute.relative) == ("p95_ttft", True, 500.0, False)
    change = parse_condition("requests_per_s<-5%")
    assert (change.above, change.limit, change.relative) == (False, -0.05, True)
    assert parse_condition("error_rate >= 1%").limit == 0.01
    assert parse_condition("goodput < 0.9").limit == 0.9


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("p95_ttft", "expected FIGURE > LIMIT"),
        ("p95_ttft > fast", "expected FIGURE > LIMIT"),
        ("p95_ttftt > 5", "no figure 'p95_ttftt'"),
        ("p95_ttft > 5%", r"a change has a sign: p95_ttft > \+5%"),
        ("p95_ttft > +20", "write it in %"),
        ("error_rate > 5ms", "not in ms"),
        ("requests_per_s > 5ms", "is in /s"),
        ("p95_ttft < -100%", "nothing falls by 100%"),
    ],
)
def test_what_is_no_condition(text: str, why: str) -> None:
    with pytest.raises(LoadTestError, match=why):
        parse_condition(text)


def test_holm_is_stricter_the_more_there_are() -> None:
    assert holm([0.04]) == [True]
    assert holm([0.04, 0.9]) == [False, False]
    assert holm([0.03, 0.001, 0.2]) == [False, True, False]
    assert holm([]) == []


def test_a_slower_run_fails_and_an_equal_one_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (write(tmp_path / n, records(rng, 600, 0.3, s)) for n, s in (("a", 1.0), ("b", 1.0), ("c", 1.3)))
    # The load of records without run.json is what was in flight at once; here it must be the same.
    for each in (a, b, c):
        stage = {"index": 0, "rate": 100.0, "arrival": "poisson", "requests": 600}
        server = Server("x", "m", [], None, False, {})
        run = asdict(Manifest(each.name, "t", {}, {}, server, {}, {}, 1, finished=[0]))
        run["stages"] = [stage]
        (each / "run.json").write_text(json.dumps(run))
    assert pareto("--compare", str(a), str(b), "--fail-if", "p95_ttft > +5%") == 0
    more = ["--fail-if", "p95_ttft > 9000", "--csv", str(tmp_path / "c.csv"), "--junit", str(tmp_path / "c.xml")]
    assert pareto("--compare", str(a), str(c), "--fail-if", "p95_ttft > +5%", *more) == 1
    output = capsys.readouterr()
    assert "failed: 100/s poisson: p95_ttft > +5%" in output.err
    assert "worse" in output.out
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    (row,) = [row for row in rows if row["figure"] == "p95_ttft"]
    assert float(row["low"]) < float(row["change"]) < float(row["high"])
    assert float(row["change"]) == pytest.approx(0.3, abs=0.15)
    suite = ElementTree.parse(tmp_path / "c.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert len(suite.findall("./testsuite/testcase/failure")) == 1
    # Verdicts tell what is shown to be within the limit from what is not known.
    sides = read_side(a, "x"), read_side(c, "x")
    texts = ("p95_ttft > +5%", "p95_ttft > +100%", "p95_ttft > +30%", "p95_ttft < -5%")
    verdicts = compare(*sides, [parse_condition(text) for text in texts]).verdicts
    assert [verdict.outcome for verdict in verdicts] == [FAILED, PASSED, OPEN, PASSED]
    assert pareto("--summarize", str(a), "--fail-if", "p95_ttft > 1") == 1
    assert [v.outcome for v in judge_run(sides[0], [parse_condition("p95_ttft > 1s")], steady=True)] == [PASSED]


def test_what_cannot_be_compared_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    a, short = write(tmp_path / "a", records(rng, 100)), write(tmp_path / "short", records(rng, 6))
    for words, why in (
        (["--compare", str(a), str(tmp_path / "gone")], "no such folder"),
        (["--compare", str(a), str(tmp_path)], "no records.jsonl"),
        (["--compare", str(a), str(short)], "no load is in both"),
        (["--compare", str(a), str(a), "--fail-if", "goodput < 0.5"], "--goodput was not given"),
        (["--compare", str(a), str(a), "--fail-if", "x > 1"], "no figure 'x'"),
        (["--compare", str(a), str(a), "--csv", str(tmp_path / "no" / "x.csv")], "there is no folder"),
        (["--compare", str(a), str(a), "--repeat", "3"], "exclude each other"),
        (["--fail-if", "p95_ttft > +5%"], "needs --compare A B"),
        (["--junit", "x.xml"], "give at least one"),
        (["--repeat", "3..2", "--until-ci", "5%"], "must be at least 1 and at most the second"),
        (["--repeat", "3..5"], "a range needs --until-ci"),
        (["--repeat", "many"], "expected a number of runs"),
        (["--repeat", "3..5", "--until-ci", "5"], "expected a percentage"),
    ):
        assert pareto(*words) == 2, words
        error = capsys.readouterr().err
        assert why in error
        assert len(error.splitlines()) == 1


def test_repeats_until_the_interval_is_narrow(
    mock_server: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, out = mock_server(ttft_ms=40).url, tmp_path / "out"
    words = f"--base-url {url} --out {out} --concurrency 4 --requests 24 --output-tokens 2 --no-progress"
    assert pareto(*words.split(), "--repeat", "2..6", "--until-ci", "99%", "--fail-if", "error_rate > 0%") == 0
    document = json.loads((out / "repeats.json").read_text())
    count = len(document["runs"])
    # At least 3, as fewer have no interval of use; on a busy machine it may take more until it is narrow.
    assert 3 <= count <= 6
    assert document["runs"] == [f"run-{number:02}" for number in range(1, count + 1)]
    widths = [document["stages"][0]["figures"][name] for name in ("p95_ttft", "p95_e2e")]
    assert count == 6 or all((each["high"] - each["low"]) / 2 <= 0.99 * each["value"] for each in widths)
    found = document["stages"][0]["figures"]["p95_ttft"]
    assert found["low"] < found["value"] < found["high"]
    assert found["value"] == pytest.approx(np.mean(document["stages"][0]["runs"]["p95_ttft"]))
    seeds = [json.loads((out / name / "summary.json").read_text())["settings"]["seed"] for name in document["runs"]]
    assert seeds == [seeds[0] + number for number in range(count)]
    assert "reached" in capsys.readouterr().out
    assert pareto(*words.split(), "--repeat", "2") == 2
    assert "run-01 exists" in capsys.readouterr().err
    # Shorter series do not leave runs of the earlier one among their own.
    assert pareto(*words.split(), "--repeat", "2", "--overwrite") == 0
    assert pareto("--compare", str(out), str(out), "--fail-if", "p95_ttft > +5%") == 0
    assert "2 runs" in capsys.readouterr().out


def test_a_failing_repeat_ends_the_series(mock_server: Factory, tmp_path: Path) -> None:
    url, out = mock_server(faults={"http_500": 2}).url, tmp_path / "out"
    words = f"--base-url {url} --out {out} --requests 24 --output-tokens 2 --no-progress --repeat 3"
    assert pareto(*words.split()) == 1
    assert sorted(path.name for path in out.glob("run-*")) == ["run-01"]
