from __future__ import annotations

import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from loadtest.deploy import preview
from loadtest.deploy.panels import PANELS
from loadtest.deploy.prometheus_api import Line


class _Answers(http.server.BaseHTTPRequestHandler):
    """Stands for Prometheus: answers every query with what ``series`` says of it."""

    asked: ClassVar[list[str]] = []
    series: ClassVar[dict[str, list[dict[str, str]]]] = {}

    def do_POST(self) -> None:
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        expr, start, end = form["query"][0], float(form["start"][0]), float(form["end"][0])
        self.asked.append(expr)
        found = [labels for part, hits in self.series.items() if part in expr for labels in hits]
        result = [
            {"metric": labels, "values": [[start, "1"], [(start + end) / 2, "NaN"], [end, "3"]]} for labels in found
        ]
        body = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answers() -> Iterator[type[_Answers]]:
    handler = type("Answers", (_Answers,), {"asked": [], "series": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def run(url: str, out: Path, *words: str) -> int:
    return preview.main(["--prometheus", url, "--out", str(out), *words])


def test_every_query_is_asked_for_without_grafanas_variables(answers: type[_Answers], tmp_path: Path) -> None:
    answers.series = {
        "vllm:": [{"instance": "a:1"}, {"instance": "b:1"}],
        "pareto_": [{"label": "x", "error": "timeout"}],
    }
    out = tmp_path / "board.png"
    assert run(answers.url, out, "--window", "40s", "--instance", "a:1", "--run", "r") == 0
    assert len(answers.asked) == sum(len(panel.queries) for panel in PANELS)
    assert not any("$" in expr for expr in answers.asked)
    assert any("[40s]" in expr and 'instance=~"a:1"' in expr for expr in answers.asked)
    assert any("[40s]" in expr and 'run=~"r"' in expr for expr in answers.asked)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_panels_without_a_line_are_named(
    answers: type[_Answers], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.series = {"num_preemptions": [{"instance": "a:1"}]}
    assert run(answers.url, tmp_path / "board.png") == 0
    err = capsys.readouterr().err
    assert f"nothing to show in {len(PANELS) - 1} panels: " in err
    assert "Preemptions" not in err


def test_bad_input_is_one_line_and_writes_nothing(
    answers: type[_Answers], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "has nothing to show of the last 30 minutes": (answers.url, tmp_path / "a.png"),
        "no answer of Prometheus": ("http://127.0.0.1:9", tmp_path / "a.png"),
        "there is no folder": (answers.url, tmp_path / "none" / "a.png"),
        "--window 4 seconds: expected a time": (answers.url, tmp_path / "a.png", "--window", "4 seconds"),
        "--minutes 0: must be above 0": (answers.url, tmp_path / "a.png", "--minutes", "0"),
        "localhost:9090: expected an address such as http://": ("localhost:9090", tmp_path / "a.png"),
    }
    for message, words in cases.items():
        assert run(*words) == 2, message
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_legend_has_the_labels_of_its_line() -> None:
    line = Line({"label": "int4", "error": "timeout"}, np.zeros(1), np.zeros(1))
    assert preview.legend("client {{error}} {{label}}", line) == "client timeout int4"
    assert preview.legend("{{reason}} {{instance}}", line) == ""
