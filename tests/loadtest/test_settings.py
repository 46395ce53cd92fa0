from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from loadtest import command
from loadtest.errors import LoadTestError
from loadtest.settings import Settings, load_settings


def settings(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return load_settings(parser.parse_args(words))


def test_defaults_are_one_user_and_a_hundred_requests() -> None:
    (stage,) = settings().stages
    assert (stage.mode, stage.concurrency, stage.requests, stage.duration_s) == ("closed", 1, 100, None)


def test_a_sweep_is_one_stage_for_each_value() -> None:
    closed = settings("--concurrency", "1", "4", "16", "--requests", "7", "--warmup", "2").stages
    assert [(s.index, s.concurrency, s.requests, s.warmup) for s in closed] == [
        (0, 1, 7, 2),
        (1, 4, 7, 2),
        (2, 16, 7, 2),
    ]
    opened = settings("--rate", "0.5", "8", "--duration", "9", "--arrival", "constant").stages
    assert [(s.rate, s.requests, s.duration_s, s.arrival, s.mode) for s in opened] == [
        (0.5, None, 9.0, "constant", "open"),
        (8.0, None, 9.0, "constant", "open"),
    ]


def test_vllms_spellings_work() -> None:
    both = settings("--request-rate", "3", "--num-prompts", "5", "--num-warmups", "1", "--max-concurrency", "2")
    (stage,) = both.stages
    assert (stage.rate, stage.requests, stage.warmup, stage.max_concurrency) == (3.0, 5, 1, 2)


def test_goodput_limits() -> None:
    assert settings("--goodput", "ttft:500", "tpot:50.5").request.slo_ms == {"ttft": 500.0, "tpot": 50.5}


def test_secrets_reach_the_requests_but_not_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings("--api-key", "sk-secret", "--header", "X-Team: hidden")
    assert given.request.headers == {"Authorization": "Bearer sk-secret", "X-Team": "hidden"}
    assert "secret" not in str(given.flags)
    assert "hidden" not in str(given.flags)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    assert settings().request.headers == {"Authorization": "Bearer sk-env"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--concurrency 4 --rate 2", "exclude each other"),
        ("--concurrency 0", "--concurrency 0: must be at least 1"),
        ("--rate 0", "--rate 0: must be above 0"),
        ("--rate inf", "--rate inf"),
        ("--requests 0", "--requests 0"),
        ("--duration -1", "--duration"),
        ("--warmup -1", "--warmup -1"),
        ("--burstiness 0 --rate 1", "--burstiness"),
        ("--max-concurrency 4", "needs --rate"),
        ("--prompt-tokens gauss:1:2", "unknown distribution 'gauss'"),
        ("--output-tokens 0", "--output-tokens 0"),
        ("--prefix-tokens -1", "--prefix-tokens"),
        ("--seed -1", "--seed"),
        ("--timeout 0", "--timeout"),
        ("--extra-body {", "not JSON"),
        ("--extra-body []", "JSON object"),
        ("--header nonsense", "NAME: VALUE"),
        ("--api-key schlüssel", "--api-key: printable ASCII"),
        ("--goodput ttfb:5", "--goodput ttfb:5"),
        ("--goodput ttft", "--goodput ttft"),
        ("--goodput ttft:-5", "--goodput ttft:-5"),
        ("--exporter-port 70000", "--exporter-port 70000"),
        ("--exporter-linger -1", "--exporter-linger -1: expected seconds, 0 or more"),
        ("--exporter-linger inf", "--exporter-linger inf"),
        ("--metrics-interval 0", "--metrics-interval"),
        ("--base-url localhost:8000", "--base-url"),
        ("--prompt-token-ids 100 --endpoint chat", "--endpoint completions"),
        ("--prompt-token-ids 100 --prompts x.txt", "exclude each other"),
        ("--prompts x.txt --prefix-tokens 5", "exclude each other"),
    ],
)
def test_bad_values_are_one_clear_line(words: str, why: str) -> None:
    with pytest.raises(LoadTestError, match=why) as error:
        settings(*words.split())
    assert "\n" not in str(error.value)


def test_out_is_a_path() -> None:
    assert settings("--out", "a/b").out == Path("a/b")
