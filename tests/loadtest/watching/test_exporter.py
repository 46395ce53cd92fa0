from __future__ import annotations

import math
import re
import socket
import threading
import time
import urllib.request
from itertools import pairwise

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtest.errors import LoadTestError
from loadtest.results.records import CANCELLED, ERROR_CLASSES, Record
from loadtest.watching.buckets import FIRST_TOKEN, LAG, TOKEN, WHOLE, Buckets, bounds
from loadtest.watching.exporter import PREFIX, Exporter

Found = dict[tuple[str, frozenset[tuple[str, str]]], float]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def scrape(port: int) -> Found:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(exporter: Exporter) -> Found:
    port = free_port()
    serving = exporter.serve("127.0.0.1", port)
    try:
        return scrape(port)
    finally:
        serving.stop()


def value(found: Found, name: str, **labels: str) -> float:
    """The one sample of a name whose labels are among these."""
    hits = [v for (n, own), v in found.items() if n == PREFIX + name and own >= set(labels.items())]
    assert len(hits) == 1, (name, labels, hits)
    return hits[0]


def test_what_is_observed_can_be_scraped() -> None:
    exporter = Exporter("int4", "small", {"ttft": 250})
    exporter.watch(lambda: 7)
    exporter.begin_stage(0, 4, None)
    times = [0.2, 0.22, 0.24]
    exporter.observe(
        Record(
            *(0, 0, False, 0.0, 0.01, 0.2, 0.24, 0.25, times),
            prompt_tokens=9,
            output_tokens=3,
        )
    )
    failed = Record(0, 1, end_s=0.1)
    failed.fail("timeout", "late")
    exporter.observe(failed)
    exporter.observe(Record(0, 2, warmup=True))
    exporter.observe(Record(0, 3, first_token_s=0.3, last_token_s=0.3, end_s=0.3, token_s=[0.3]))
    exporter.observe_loop_lag(0.004)
    found = scraped(exporter)
    assert value(found, "requests_total", outcome="ok") == 2
    assert value(found, "requests_total", error="timeout") == 1
    assert value(found, "warmup_requests_total") == 1
    assert value(found, "output_tokens_total") == 3  # Nobody counted those of the other answer.
    assert value(found, "prompt_tokens_total") == 9
    assert value(found, "good_requests_total") == 1
    assert value(found, "goodput_limit_seconds", of="ttft") == 0.25
    assert value(found, "time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert value(found, "time_per_output_token_seconds_sum") == pytest.approx(0.02)
    assert value(found, "inter_token_latency_seconds_count") == 2
    assert value(found, "e2e_request_latency_seconds_sum") == pytest.approx(0.55)
    assert value(found, "schedule_lag_seconds_sum") == pytest.approx(0.01)
    assert value(found, "loop_lag_seconds_sum") == pytest.approx(0.004)
    assert value(found, "requests_in_flight") == 7
    assert value(found, "target_concurrency") == 4


def test_every_series_says_what_it_is_of() -> None:
    exporter = Exporter("int4", "small", {"tpot": 50})
    exporter.begin_stage(0, 1, None)
    exporter.begin_stage(1, None, 2.5)
    of_run = {("run", exporter.run), ("label", "int4"), ("model", "small")}
    found = scraped(exporter)
    assert all(labels >= of_run for _, labels in found)
    assert {dict(labels)["stage"] for _, labels in found} == {"0", "1"}
    assert value(found, "target_rate", stage="1") == 2.5
    assert re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{4}", exporter.run)
    assert Exporter().run != exporter.run


def test_all_series_are_there_before_anything_happened() -> None:
    """An increase shows only between two samples: the first error of a class must not be the first sample of it."""
    exporter = Exporter("x", "m", {"ttft": 1})
    exporter.begin_stage(0, 1, None)
    found = scraped(exporter)
    for name in ERROR_CLASSES:
        assert value(found, "requests_total", outcome="error", error=name) == 0
    assert value(found, "requests_total", outcome="ok") == 0
    assert value(found, "requests_total", outcome=CANCELLED) == 0
    for name in ("good_requests_total", "warmup_requests_total", "output_tokens_total"):
        assert value(found, name) == 0
    for name in ("time_to_first_token", "time_per_output_token", "e2e_request_latency", "schedule_lag", "loop_lag"):
        assert value(found, f"{name}_seconds_count") == 0


def test_without_limits_there_is_no_goodput() -> None:
    exporter = Exporter()
    exporter.begin_stage(0, 1, None)
    names = {name for name, _ in scraped(exporter)}
    assert f"{PREFIX}good_requests_total" not in names
    assert f"{PREFIX}goodput_limit_seconds" not in names


def test_stages_of_long_ago_go_once_they_were_scraped() -> None:
    exporter = Exporter()
    for index in range(5):
        exporter.begin_stage(index, 1, None)
    stages = {dict(labels)["stage"] for _, labels in scraped(exporter)}
    assert stages == set("01234"), "none of them was seen before"
    exporter.begin_stage(5, 1, None)
    assert {dict(labels)["stage"] for _, labels in scraped(exporter)} == set("45")


def test_a_quantile_from_buckets_is_within_5_percent() -> None:
    """Whatever is measured: also where all values are the same, which is the worst case."""
    rng = np.random.default_rng()
    for low, high, upper in ((0.001, 120, FIRST_TOKEN), (0.0005, 10, TOKEN), (0.005, 600, WHOLE)):
        assert upper[0] == low
        assert upper[-1] == high
        for values in (
            np.full(100, math.exp(rng.uniform(math.log(low * 1.01), math.log(high)))),
            rng.lognormal(math.log(low * 30), 0.5, 2000).clip(low * 1.01, high),
        ):
            buckets = Buckets(upper)
            buckets.add(values.tolist())
            rows, total = buckets.snapshot()
            assert total == pytest.approx(values.sum())
            assert rows[-1] == ("+Inf", len(values))
            for q in (0.5, 0.95):
                exact = np.quantile(values, q, method="inverted_cdf")
                assert quantile(rows, q) == pytest.approx(exact, rel=0.05), (q, values[:3])


def quantile(rows: list[tuple[str, float]], q: float) -> float:
    """As Prometheus' histogram_quantile does it."""
    rank, before, low = q * rows[-1][1], 0.0, 0.0
    for name, count in rows:
        if count >= rank:
            return low + (float(name) - low) * (rank - before) / (count - before)
        before, low = count, float(name)
    raise AssertionError


@pytest.mark.parametrize(("low", "high", "factor"), [(0.001, 80, 1.05), (0.0001, 60, 1.2), (1, 2, 2)])
def test_bounds_never_jump_by_more_than_the_factor(low: float, high: float, factor: float) -> None:
    found = bounds(low, high, factor)
    assert found[0] == low
    assert found[-1] == high
    # Four digits of a bound shift it by less than a thousandth.
    assert all(1 < after / before < factor * 1.001 for before, after in pairwise(found))


def test_the_buckets_of_the_lag_are_coarser_but_fine_enough() -> None:
    assert all(after / before < 1.202 for before, after in pairwise(LAG))


def test_it_lingers_until_the_last_values_were_scraped() -> None:
    exporter = Exporter()
    exporter.begin_stage(0, 1, None)
    port = free_port()
    serving = exporter.serve("127.0.0.1", port)
    seen: list[float] = []
    try:
        scrape(port)
        exporter.observe(Record(0, 0, first_token_s=0.2, end_s=0.3, token_s=[0.2]))
        # Only a scrape that begins from now on has the last record.
        late = threading.Timer(0.3, lambda: seen.append(value(scrape(port), "requests_total", outcome="ok")))
        late.start()
        assert serving.linger(60, time.sleep)
        late.join()
    finally:
        serving.stop()
    assert seen == [1]


def test_it_lingers_no_longer_than_it_may() -> None:
    serving = Exporter().serve("127.0.0.1", free_port())
    try:
        assert not serving.linger(0.2, time.sleep)
    finally:
        serving.stop()


def test_ctrl_c_ends_the_lingering_at_once() -> None:
    serving = Exporter().serve("127.0.0.1", free_port())
    waits: list[float] = []
    try:
        assert not serving.linger(3600, lambda seconds: waits.append(seconds) or len(waits) == 3)
    finally:
        serving.stop()
    assert len(waits) == 3


def test_what_is_no_scrape_does_not_end_the_lingering() -> None:
    port = free_port()
    serving = Exporter().serve("127.0.0.1", port)

    def knock(_: float) -> None:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/favicon.ico", timeout=10).read()

    try:
        assert not serving.linger(0.2, knock)
    finally:
        serving.stop()


def test_a_stopped_exporter_frees_its_port() -> None:
    port = free_port()
    for _ in range(2):
        Exporter().serve("127.0.0.1", port).stop()


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(LoadTestError, match=f"--exporter-port {port}: cannot listen.*in use"):
            Exporter().serve("127.0.0.1", port)


def test_only_the_address_asked_for_listens() -> None:
    port = free_port()
    serving = Exporter().serve("127.0.0.1", port)
    try:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=5)
    finally:
        serving.stop()
