from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtest.errors import LoadTestError
from loadtest.results.records import Record
from loadtest.watching.exporter import Exporter


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_observed_can_be_scraped() -> None:
    exporter = Exporter()
    exporter.watch(lambda: 7)
    exporter.begin_stage(4, None)
    times = [0.2, 0.22, 0.24]
    exporter.observe(
        Record(0, 0, first_token_s=0.2, last_token_s=0.24, end_s=0.25, token_s=times, prompt_tokens=9, output_tokens=3)
    )
    failed = Record(0, 1, end_s=0.1)
    failed.fail("timeout", "late")
    exporter.observe(failed)
    exporter.observe(Record(0, 2, warmup=True))
    port = free_port()
    stop = exporter.serve("127.0.0.1", port)
    try:
        found = scrape(port)
    finally:
        stop()
    name = "pareto_loadtest_"
    assert found[f"{name}requests_total", (("error", ""), ("outcome", "ok"))] == 1
    assert found[f"{name}requests_total", (("error", "timeout"), ("outcome", "error"))] == 1
    assert found[f"{name}warmup_requests_total", ()] == 1
    assert found[f"{name}output_tokens_total", ()] == 3
    assert found[f"{name}prompt_tokens_total", ()] == 9
    assert found[f"{name}time_to_first_token_seconds_sum", ()] == pytest.approx(0.2)
    assert found[f"{name}time_to_first_token_seconds_bucket", (("le", "0.15"),)] == 0
    assert found[f"{name}time_to_first_token_seconds_bucket", (("le", "0.2"),)] == 1
    assert found[f"{name}time_per_output_token_seconds_sum", ()] == pytest.approx(0.02)
    assert found[f"{name}inter_token_latency_seconds_count", ()] == 2
    assert found[f"{name}e2e_request_latency_seconds_sum", ()] == pytest.approx(0.25)
    assert found[f"{name}requests_in_flight", ()] == 7
    assert found[f"{name}target_concurrency", ()] == 4


def test_a_stopped_exporter_frees_its_port() -> None:
    port = free_port()
    for _ in range(2):
        Exporter().serve("127.0.0.1", port)()


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(LoadTestError, match=f"--exporter-port {port}: cannot listen.*in use"):
            Exporter().serve("127.0.0.1", port)


def test_only_the_address_asked_for_listens() -> None:
    port = free_port()
    stop = Exporter().serve("127.0.0.1", port)
    try:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=5)
    finally:
        stop()
