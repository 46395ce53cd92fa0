"""The client's half of the board on a real Prometheus, under load on the mock; tests/end_to_end has all of it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from loadtest.deploy.panels import PANELS, Needs, filled
from loadtest.deploy.prometheus_api import Prometheus
from loadtest.errors import LoadTestError
from loadtest.mock_server import MockConfig, MockServer
from loadtest.results.records import Record
from tests.watching import LATENCIES, check_quantiles, free_port, load, prometheus, seen


@dataclass(frozen=True)
class Watched:
    """A load test that is over, and the Prometheus that watched it."""

    prometheus: Prometheus
    url: str
    records: list[Record]
    start: float
    end: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, port = tmp_path_factory.mktemp("watched"), free_port()
    # Fewer places than users, so that first tokens come at many different times; an error now and then.
    config = MockConfig(ttft_ms=150, itl_ms=15, capacity=3, faults={"http_500": 9})
    with MockServer(config) as mock:
        targets = {"vllm": mock.url.removeprefix("http://"), "loadtest": f"127.0.0.1:{port}"}
        with prometheus(folder / "prometheus", targets, "500ms") as (server, url):
            begin = time.time()
            # Warm-up lasts longer than two scrapes: the series are seen at 0, and every request counts.
            words = ["--concurrency", "5", "--warmup", "9", "--requests", "50", "--goodput", "ttft:400"]
            words += ["--output-tokens", "uniform:2:30", "--max-error-rate", "1"]
            records = load(mock.url, port, folder / "out", *words)
            yield Watched(server, url, records, begin, time.time())


def test_no_query_about_a_load_test_is_empty(watched: Watched) -> None:
    found = {
        f"{panel.title}: {query.legend}": watched.prometheus.range(
            filled(query.expr, "2s"), watched.start, watched.end, 0.5
        )
        for panel in PANELS
        for query in panel.queries
        if query.needs in (Needs.LOAD, Needs.GOODPUT)
    }
    assert len(found) > 10
    assert [name for name, lines in found.items() if not seen(lines)] == []
    errors = found["Errors by class: client {{error}} {{label}}"]
    assert max(line.values.max() for line in errors if line.labels["error"] == "http_5xx") > 0
    assert all(line.values.max() == 0 for line in errors if line.labels["error"] == "timeout")


@pytest.mark.parametrize("name", LATENCIES)
def test_quantiles_are_within_5_percent_of_the_exact(watched: Watched, name: str) -> None:
    check_quantiles(watched.prometheus, watched.records, name, watched.start, watched.end)


def test_the_last_scrape_has_every_request(watched: Watched) -> None:
    expr = 'sum by (outcome) (max_over_time(pareto_loadtest_requests_total{label="tried"}[5m]))'
    found = {json.loads(labels)["outcome"]: value for labels, value in watched.prometheus.instant(expr).items()}
    outcomes = [record.outcome for record in watched.records]
    assert found == {"ok": outcomes.count("ok"), "error": outcomes.count("error"), "cancelled": 0}
    assert found["error"] > 0


def test_a_wrong_expression_and_a_wrong_address_are_one_line(watched: Watched) -> None:
    with pytest.raises(LoadTestError, match=r"/api/v1/query: status 400: .*parse error"):
        watched.prometheus.instant("sum by (")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LoadTestError, match=rf"127.0.0.1:{port}: no answer of Prometheus: .*refused"):
        Prometheus(f"http://127.0.0.1:{port}").instant("vector(1)")
