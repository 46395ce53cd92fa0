"""The page, its plots, the CSV and the JUnit file of runs and comparisons."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from loadtest.comparison.compare import compare
from loadtest.comparison.side import read_side
from loadtest.mock_server import MockServer
from loadtest.report.page import render
from loadtest.report.series import panels
from tests.loadtest.simulated import records, write
from vllm_ext import cli

Factory = Callable[..., MockServer]


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, value in attrs if value and not value.startswith("#")}
        if tag not in ("meta", "path", "line", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(path: Path) -> str:
    text, reader = path.read_text(), Text()
    reader.feed(text)
    assert reader.open == []
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http://127[^<,]*', "", text)
    return " ".join(" ".join(reader.words).split())


def test_a_run_with_its_files(mock_server: Factory, tmp_path: Path) -> None:
    url = mock_server(ttft_ms=20, itl_ms=2, capacity=4, faults={"http_503": 20}).url
    words = f"--base-url {url} --rate 40 80 --requests 40 --output-tokens 4 --goodput ttft:900 --metrics-interval 0.1"
    files = [f"--{kind}={tmp_path / f'run.{kind}'}" for kind in ("report", "csv", "junit")]
    out = tmp_path / "<out>"
    status = cli.main(
        [
            "loadtest",
            *words.split(),
            "--out",
            str(out),
            "--no-progress",
            "--fail-if",
            "p95_ttft > 1",
            *files,
        ]
    )
    assert status == 1
    text = page(tmp_path / "run.report")
    for expected in ("40/s poisson", "p95_ttft > 1", "failed", "http_5xx", "time to first token", "% of values at most",
                     "server, requests", "requests offered a second", "TTFT, ms", "tokens/s"):  # fmt: skip
        assert expected in text, expected
    assert "<out>" not in (tmp_path / "run.report").read_text().replace("&lt;out&gt;", "")
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert {row["load"] for row in rows} == {"40/s poisson", "80/s poisson"}
    for row in rows:
        if row["figure"] == "error_rate" and row["part"] == "all":
            assert float(row["value"]) == pytest.approx(2 / 40)
    assert ElementTree.parse(tmp_path / "run.junit").getroot().get("failures") == "2"


def test_a_comparison(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = []
    for name, slower in (("one", 1.0), ("two", 1.5)):
        side = read_side(write(tmp_path / name, records(rng, 300, 0.0, slower)), "x")
        # Of records alone the load is what was in flight at once, which is not the same here.
        stage = replace(side.stages[0], concurrency=9)
        sides.append(
            replace(side, runs=(replace(side.runs[0], summary=replace(side.runs[0].summary, stages=[stage])),))
        )
    (tmp_path / "c.html").write_text(render(None, compare(sides[0], sides[1], []), []))
    text = page(tmp_path / "c.html")
    assert "Changes from A to B" in text
    assert re.search(r"p95_ttft [\d.]+ ms [\d.]+ ms \+[45]\d\.\d+% .* worse", text)
    assert "two: 9 users" in text


def test_the_time_line_adds_up(tmp_path: Path) -> None:
    items = records(np.random.default_rng(1), 400)
    for item in items[::4]:
        item.fail("timeout", "late")
    (run,) = read_side(write(tmp_path / "a", items), "x").runs
    found, begins = panels(run)
    lines = {line.name: line for panel in found for line in panel.lines}
    bin_s = lines["offered"].x[1] - lines["offered"].x[0]
    assert lines["offered"].y.sum() * bin_s == pytest.approx(400)
    assert lines["answered"].y.sum() * bin_s == pytest.approx(300)
    assert lines["failed"].y.sum() * bin_s == pytest.approx(100)
    assert lines["output"].y.sum() * bin_s == pytest.approx(900)
    assert lines["requests"].y[-1] == 0
    assert lines["requests"].y.max() >= 5
    assert begins == [(0.0, "0")]
