"""Energy and power of the server's GPUs, from a page such as NVIDIA's dcgm-exporter serves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loadtest.mock_server import MockServer
from loadtest.results.energy import COUNTER, POWER, energy_of
from loadtest.results.schema import MetricSeries
from tests.loadtest.test_command import pareto as run

Factory = Callable[..., MockServer]


class Exporter(ThreadingHTTPServer):
    """Two GPUs, each of which has used another joule whenever it is asked; the second draws 200 W."""

    daemon_threads = True
    reads, step = 0, 1000


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Exporter)
        server.reads += 1
        lines = [f"# TYPE {COUNTER} counter", 'DCGM_FI_DEV_SM_CLOCK{gpu="0"} 1980']
        for gpu, watts in ((0, 100), (1, 200)):
            labels = f'{{gpu="{gpu}",UUID="GPU-{gpu}",modelName="NVIDIA H100"}}'
            lines += [f"{COUNTER}{labels} {10**9 + server.reads * server.step}", f"{POWER}{labels} {watts}.0"]
        body = "\n".join(lines).encode()
        self.send_response(200 if self.path == "/metrics" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    with Exporter(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def url(server: Exporter) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_energy_of_a_stage(mock_server: Factory, exporter: Exporter, tmp_path: Path) -> None:
    words = ["--base-url", mock_server(ttft_ms=5, itl_ms=1).url, "--concurrency", "1", "2", "--requests", "20"]
    words += ["--output-tokens", "10", "--metrics-interval", "0.05", "--gpu-metrics", url(exporter)]
    done = run(
        *words, "--out", str(tmp_path / "out"), "--report", str(tmp_path / "r.html"), "--csv", str(tmp_path / "c")
    )
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "out/summary.json").read_text())["stages"]
    for stage in stages:
        series = stage["server_metrics"][COUNTER]
        # Both GPUs' joules between the first and the last sample of the stage; another may be read at the same moment.
        assert 0 < 2 * (series["samples"] - 1) <= stage["energy"]["joules"] <= 2 * exporter.reads
        assert stage["energy"]["joules"] == series["delta"] / 1000
        assert stage["energy"]["mean_watts"] == 300
        assert stage["energy"]["joules_per_output_token"] == pytest.approx(stage["energy"]["joules"] / 200)
    assert "J/token" in done.stdout
    assert "GPU power, W" in (tmp_path / "r.html").read_text()
    found = [line.split(",") for line in (tmp_path / "c").read_text().splitlines() if ",joules," in line]
    assert [float(line[7]) for line in found] == [stage["energy"]["joules"] for stage in stages]
    # What is summarized again from the files is the same.
    (tmp_path / "out/summary.json").unlink()
    assert run("--summarize", str(tmp_path / "out")).returncode == 0
    again = json.loads((tmp_path / "out/summary.json").read_text())["stages"]
    assert [stage["energy"] for stage in again] == [stage["energy"] for stage in stages]


def test_what_is_no_such_page_ends_with_one_line(mock_server: Factory, exporter: Exporter, tmp_path: Path) -> None:
    server, out = mock_server().url, tmp_path / "out"
    for address, why in (
        ("http://node:port", "expected an address such as http://node:9400/metrics"),
        ("node:9400", "expected an address such as http://node:9400/metrics"),
        (f"{url(exporter)}/nothing", "cannot be read (HTTP 404"),
        (f"{server}/metrics", f"has no {COUNTER}; expected the page of NVIDIA's dcgm-exporter"),
        ("http://127.0.0.1:9", "cannot be read"),
    ):
        done = run("--base-url", server, "--requests", "1", "--gpu-metrics", address, "--out", str(out))
        assert done.returncode == 2
        assert why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not out.exists()


def test_a_counter_that_stands_still_is_no_energy() -> None:
    assert energy_of({}, 10) == (None, [])
    found, (note,) = energy_of({COUNTER: MetricSeries(3, 5.0, 5.0, 5.0, 5.0, 0.0)}, 10)
    assert found is None
    assert "--collect-interval" in note
    known, _ = energy_of({COUNTER: MetricSeries(3, 5.0, 5.0, 1000.0, 6000.0, 5000.0)}, None)
    assert known is not None
    assert (known.joules, known.mean_watts, known.joules_per_output_token) == (5.0, None, None)
