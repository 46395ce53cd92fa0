from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest

from loadtest.endpoint.client import Client
from loadtest.mock_server import MockServer
from loadtest.watching.server_metrics import Sampler, cache_config, parse_metrics, summarize_samples

TEXT = """\
# HELP vllm:num_requests_running Number
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:time_to_first_token_seconds_bucket{le="0.1"} 7.0
vllm:time_to_first_token_seconds_sum{engine="0"} 1.5e-1
vllm:time_to_first_token_seconds_created{engine="0"} 1.7e+09
vllm:cache_config_info{block_size="16",cache_dtype="int4_per_head",note="a \\"b\\" }"} 1.0
pareto_kv_pages 12 1700000000
python_gc_objects_collected_total{generation="0"} 9
vllm:broken{engine="0"} much
"""


def test_own_and_vllm_metrics_are_read_and_the_rest_left_out() -> None:
    assert parse_metrics(TEXT) == {
        'vllm:num_requests_running{engine="0",model_name="m"}': 3.0,
        'vllm:num_requests_running{engine="1",model_name="m"}': 4.0,
        'vllm:kv_cache_usage_perc{engine="0"}': 0.25,
        'vllm:kv_cache_usage_perc{engine="1"}': 0.75,
        'vllm:time_to_first_token_seconds_sum{engine="0"}': 0.15,
        "pareto_kv_pages": 12.0,
    }


def test_the_cache_configuration_is_read_from_its_labels() -> None:
    assert cache_config(TEXT)["cache_dtype"] == "int4_per_head"
    assert cache_config("") == {}


def test_peak_mean_and_growth_over_samples() -> None:
    later = TEXT.replace(" 3.0\n", " 9.0\n").replace(" 0.75\n", " 0.5\n").replace("1.5e-1", "0.65")
    series = summarize_samples([parse_metrics(TEXT), parse_metrics(later)])
    running = series["vllm:num_requests_running"]
    assert (running.samples, running.mean, running.peak, running.first, running.last) == (2, 10.0, 13.0, 7.0, 13.0)
    assert series["vllm:kv_cache_usage_perc"].peak == 0.75
    assert series["vllm:kv_cache_usage_perc"].mean == 0.625
    assert series["vllm:time_to_first_token_seconds_sum"].delta == pytest.approx(0.5)


def test_sampling_a_server(mock_server: Callable[..., MockServer], tmp_path: Path) -> None:
    sampler = Sampler(Client(mock_server().url, 5), tmp_path / "m.jsonl", 0.05)
    sampler.start()
    gevent.sleep(0.1)
    sampler.enter(0)
    gevent.sleep(0.3)
    sampler.stop()
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {-1, 0}
    assert sampler.series(0)["vllm:num_requests_running"].samples == sum(line["stage"] == 0 for line in lines) >= 3


def test_a_server_without_metrics_disturbs_nothing(tmp_path: Path) -> None:
    sampler = Sampler(Client("http://127.0.0.1:9", 5), tmp_path / "m.jsonl", 0.05)
    sampler.sample()
    sampler.stop()
    assert not sampler.found()
    assert "error" in json.loads((tmp_path / "m.jsonl").read_text())
    assert sampler.series(0) == {}
