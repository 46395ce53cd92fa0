"""Every query of the board and every rule, on a real Prometheus that scrapes a real server under load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from bench.server import starting
from loadtest.deploy import preview
from loadtest.deploy.panels import PANELS, filled
from loadtest.deploy.prometheus_api import Line, Prometheus
from loadtest.deploy.rules import rules
from loadtest.results.records import Record
from tests.watching import DEPLOY, LATENCIES, check_quantiles, free_port, load, prometheus, seen

# Where other work takes the cores, the load makes no queue, and panels of waiting find nothing.
pytestmark = [pytest.mark.engine, pytest.mark.long]


@dataclass(frozen=True)
class Watched:
    """Two load tests that are over, the records of the second and its beginning, and what watched them."""

    prometheus: Prometheus
    url: str
    records: list[Record]
    start: float
    second: float
    end: float

    def range(self, expr: str) -> list[Line]:
        return self.prometheus.range(filled(expr, "5s"), self.start, self.end, 1.0)


@pytest.fixture(scope="module")
def watched(ref_7m: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, port = tmp_path_factory.mktemp("watched"), free_port()
    # A cache of 2 MiB, too small for those who ask at once: requests wait, are preempted, and blocks are evicted.
    words = [str(ref_7m), "--config", str(DEPLOY / "server.yaml"), "--kv-cache-metrics-sample", "1.0"]
    words += ["--served-model-name", "small", "--kv-cache-dtype", "int4_per_head", "--enforce-eager"]
    words += ["--max-model-len", "512", "--block-size", "32", "--kv-cache-memory-bytes", str(2**21)]
    request = ["--prompt-tokens", "uniform:50:250", "--prefix-tokens", "96", "--output-tokens", "uniform:20:100"]
    request += ["--goodput", "ttft:5000", "--warmup", "4"]
    with starting(words, folder / "serve.log") as start:
        server = start.wait()
        targets = {"vllm": server.base_url.removeprefix("http://"), "loadtest": f"127.0.0.1:{port}"}
        with prometheus(folder / "prometheus", targets) as (asked, url):
            begin = time.time()
            load(server.base_url, port, folder / "first", "--concurrency", "12", "--requests", "60", *request)
            second = time.time()
            # Other prompts, which drive the prefix of the first ones out of the cache.
            words = ["--rate", "6", "--requests", "60", *request]
            records = load(server.base_url, port, folder / "second", *words)
            yield Watched(asked, url, records, begin, second, time.time())


def test_no_query_of_the_board_is_empty(watched: Watched) -> None:
    found = {(panel.title, query.legend): watched.range(query.expr) for panel in PANELS for query in panel.queries}
    assert len(found) > 40
    assert [name for name, lines in found.items() if not seen(lines)] == []
    # What must not only be there, but have happened.
    for title in ("Preemptions per second", "Prefix hits", "Goodput", "Waiting by reason", "Cache use"):
        lines = [line for (panel, _), hits in found.items() if panel == title for line in hits]
        assert max(np.nanmax(line.values) for line in lines) > 0, title


def test_no_rule_is_empty(watched: Watched) -> None:
    """Alerts compare what is recorded, or what stands before their comparison, with a limit."""
    for group in rules()["groups"]:
        for rule in group["rules"]:
            for side in [rule["expr"]] if "record" in rule else rule["expr"].split(" and "):
                value = side.rsplit(" > ", 1)[0].rsplit(" == ", 1)[0]
                assert seen(watched.range(value)), value


@pytest.mark.parametrize("name", LATENCIES)
def test_quantiles_of_the_client_are_within_5_percent_of_the_exact(watched: Watched, name: str) -> None:
    check_quantiles(watched.prometheus, watched.records, name, watched.second, watched.end)


def test_the_server_counts_in_buckets_of_5_percent(watched: Watched) -> None:
    """Its exact times are unknown, but they lie in these buckets."""
    settings = yaml.safe_load((DEPLOY / "server.yaml").read_text())["custom-histogram-buckets"]
    for metric, family in (
        ("vllm:time_to_first_token_seconds", "time_to_first_token"),
        ("vllm:request_time_per_output_token_seconds", "inter_token_latency"),
        ("vllm:e2e_request_latency_seconds", "request_latency"),
    ):
        lines = watched.range(f"sum by (le) ({metric}_bucket)")
        bounds = sorted(float(line.labels["le"]) for line in lines if line.labels["le"] != "+Inf")
        assert bounds == pytest.approx(settings[family])
        assert max(after / before for before, after in pairwise(bounds)) < 1.051


def test_server_and_client_count_the_same_requests(watched: Watched) -> None:
    window = f"{watched.end - watched.start + 1:.0f}s"
    for expr, measured in (
        ('max_over_time(sum(vllm:request_success_total{finished_reason="length"})[W:1s])', 60 + 4 + 60 + 4),
        ('max_over_time(sum(http_requests_total{handler="/v1/completions",status="2xx"})[W:1s])', 60 + 4 + 60 + 4),
    ):
        (count,) = watched.prometheus.instant(expr.replace("W", window), watched.end).values()
        # One-token requests, too, may have asked what prompts cost.
        assert measured <= count <= measured + 8, expr


def test_the_preview_shows_all_of_it(watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "board.png"
    minutes = str((time.time() - watched.start) / 60)
    assert (
        preview.main(["--prometheus", watched.url, "--out", str(picture), "--minutes", minutes, "--window", "5s"]) == 0
    )
    assert "nothing to show" not in capsys.readouterr().err
    assert picture.read_bytes().startswith(b"\x89PNG")
