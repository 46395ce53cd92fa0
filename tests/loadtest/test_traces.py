"""Traces: each format gives the same requests, and prompts share as many tokens as the trace says, block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.errors import LoadTestError
from loadtest.workloads.prompt import FIRST, Phase
from loadtest.workloads.prompts import WORDS, TokenCost
from loadtest.workloads.traces.entry import Entry
from loadtest.workloads.traces.prompts import TracePrompts
from loadtest.workloads.traces.registry import FORMATS, read_trace

COST = TokenCost(1.0, 5.0, WORDS, "known")
RNG = np.random.default_rng(0)
EXPECTED = [(0.0, 600, 20), (1.5, 900, 1), (4.0, 10, 7)]


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def span(start: int, tokens: tuple[str, int], output: tuple[str, int] | None) -> dict[str, Any]:
    counts = [tokens, *([output] if output else [])]
    return {
        "name": "chat m",
        "startTimeUnixNano": str(start),
        "attributes": [{"key": key, "value": {"intValue": str(value)}} for key, value in counts],
    }


T0 = 1_700_000_000 * 10**9
NEW, OLD = "gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"
OUT = "gen_ai.usage.output_tokens"
MOONCAKE = lines(
    {"timestamp": 1000, "input_length": 600, "output_length": 20, "hash_ids": [0, 1]},
    {"timestamp": 2500, "input_length": 900, "output_length": 0, "hash_ids": [0, 2]},
    {"timestamp": 5000, "input_length": 10, "output_length": 7, "hash_ids": [3]},
)
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,600,20,620,Conversation log
6,GPT-4,77,0,77,Conversation log
6.5,GPT-4,900,1,901,API log
9,ChatGPT,10,7,17,API log
"""
OTLP = lines(
    {"resourceSpans": [{"scopeSpans": [{"spans": [span(T0, (NEW, 600), (OUT, 20)), span(T0, ("x", 1), None)]}]}]},
    # vLLM's names, and the later of two spans first.
    {
        "resourceSpans": [
            {
                "scopeSpans": [
                    {"spans": [span(T0 + 4 * 10**9, (OLD, 10), ("gen_ai.usage.completion_tokens", 7))]},
                    {"spans": [span(T0 + 15 * 10**8, (OLD, 900), None)]},
                ]
            }
        ]
    },
)
FLAT_SPANS = lines(
    {"start_time": "2024-01-01T00:00:00Z", "attributes": {NEW: 600, OUT: 20}},
    {"start_time": "2024-01-01T00:00:01.500000Z", "attributes": {NEW: 900, OUT: 1}},
    {"start_time": "2024-01-01T01:00:04+01:00", "attributes": {NEW: 10, OUT: 7}},
)
OWN = lines(
    {"stage": 0, "index": 0, "warmup": True, "intended_unix_s": 90.0, "prompt_tokens": 5, "output_tokens": 5},
    {"stage": 0, "index": 1, "intended_unix_s": 101.5, "requested_prompt_tokens": 900, "requested_output_tokens": 1},
    {"stage": 0, "index": 0, "intended_unix_s": 100.0, "prompt_tokens": 600, "output_tokens": 20},
    {"stage": 0, "index": 2, "intended_unix_s": 104.0, "prompt_tokens": 10, "output_tokens": 7},
)


def write(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("x.jsonl", MOONCAKE, "mooncake"),
        ("x.csv", BURSTGPT, "burstgpt"),
        ("x.jsonl", OTLP, "otel"),
        ("x.json", OTLP, "otel"),
        ("x.jsonl", FLAT_SPANS, "otel"),
        ("x.jsonl", OWN, "records"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_every_format_gives_the_same_requests(tmp_path: Path, name: str, text: str, kind: str, known: bool) -> None:
    entries = read_trace(write(tmp_path, name, text), kind if known else "auto")
    found = [(entry.at_s, entry.input_tokens, entry.output_tokens) for entry in entries]
    assert found == [(pytest.approx(at, abs=1e-6), tokens, output) for at, tokens, output in EXPECTED]
    assert list(TracePrompts(entries, 0, COST).times) == [entry.at_s for entry in entries]


@pytest.mark.parametrize(
    ("name", "text", "kind", "why"),
    [
        ("x.jsonl", lines({"prompt": "a"}), "auto", r"x.jsonl:1: no trace that is known; expected one of mooncake"),
        ("x.jsonl", MOONCAKE, "burstgpt", "no row of the format burstgpt"),
        ("x.csv", "Timestamp,Request tokens,Response tokens\n1,5,0\n", "auto", "no requests in the trace"),
        (
            "x.csv",
            "Timestamp,Request tokens,Response tokens\nsoon,5,1\n",
            "auto",
            "x.csv:2: Timestamp must be a number",
        ),
        ("x.jsonl", MOONCAKE + lines({"timestamp": 1}), "auto", "x.jsonl:4: no input_length"),
        (
            "x.jsonl",
            lines({"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}),
            "auto",
            "1 hash_ids for 513 tokens; one is for 512",
        ),
        (
            "x.jsonl",
            lines({"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [True]}),
            "auto",
            "hash_ids must be a list of whole numbers",
        ),
        ("x.jsonl", lines({"timestamp": 1, "input_length": True, "output_length": 1}), "auto", "input_length must be"),
        ("x.jsonl", lines({"resourceSpans": [{"scopeSpans": 7}]}), "auto", "not OTLP as JSON"),
        ("x.jsonl", lines({"start_time": "noon", "attributes": {NEW: 5}}), "auto", "'noon' is no time"),
        ("x.jsonl", lines({"intended_unix_s": 1.0}), "auto", "neither prompt_tokens nor requested_prompt_tokens"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, name: str, text: str, kind: str, why: str) -> None:
    with pytest.raises(LoadTestError, match=why) as error:
        read_trace(write(tmp_path, name, text), kind)
    assert "\n" not in str(error.value)
    assert "--trace " in str(error.value)


def test_a_format_is_one_line_in_the_registry() -> None:
    assert list(FORMATS) == ["mooncake", "burstgpt", "otel", "records"]
    for format_ in FORMATS.values():
        assert not any(format_.matches(row) for row in ("text", 7, None, [], {}))


def entry(tokens: int, *blocks: int) -> Entry:
    return Entry(0.0, tokens, 1, blocks or None)


def shared(first: list[Any], second: list[Any]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(map(len, (first, second)))
    )


@pytest.mark.parametrize("ids", [None, (100, 50_000)])
def test_prompts_share_the_blocks_that_the_trace_says(ids: tuple[int, int] | None) -> None:
    # 1 and 2 share two blocks, 3 and 1 one block; 4 has the second block of 1 in another place.
    trace = [entry(1300, 0, 1, 2), entry(1400, 0, 1, 3), entry(1024, 0, 4), entry(512, 1), entry(1000)]
    source = TracePrompts(trace, 0, None if ids else COST, ids)

    def units(number: int, phase: Phase = FIRST) -> list[Any]:
        content = source.prompt(RNG, number, phase).content
        return content.split() if isinstance(content, str) else list(content)

    overhead = 0 if ids else 5
    assert [len(units(i)) + overhead for i in range(5)] == [1300, 1400, 1024, 512, 1000]
    assert [source.prompt(RNG, i).tokens for i in range(5)] == [1300, 1400, 1024, 512, 1000]
    # Two equal tokens after the shared ones would be chance: one in 188 words.
    assert 1024 <= shared(units(0), units(1)) <= 1027
    assert 512 <= shared(units(0), units(2)) <= 515
    assert shared(units(0), units(3)) <= 4
    assert shared(units(0), units(4)) <= 4
    assert units(0) == units(0)
    if ids:
        assert all(100 <= each < 50_000 for each in units(0))


def test_no_cache_knows_a_trace_from_before() -> None:
    source = TracePrompts([entry(700, 0, 1), entry(600, 0, 2)], 3, None, (0, 50_000))

    def ids(number: int, phase: Phase = FIRST) -> list[Any]:
        return list(source.prompt(RNG, number, phase).content)

    others = [ids(2), ids(0, Phase(1)), ids(0, Phase(0, warmup=True))]
    others.append(list(TracePrompts([entry(700, 0, 1)], 4, None, (0, 50_000)).prompt(RNG, 0).content))
    assert all(shared(ids(0), other) <= 3 for other in others)
    # Within the second round as within the first.
    assert shared(ids(2), ids(3)) >= 512


def test_words_of_more_than_a_token_keep_the_blocks_whole() -> None:
    cost = TokenCost(1.3, 2.0, WORDS, "known")
    source = TracePrompts([entry(1536, 7, 8, 9), entry(1200, 7, 8, 10)], 0, cost)
    first, second = (str(source.prompt(RNG, i).content).split() for i in range(2))
    assert (len(first), len(second)) == (round(1534 / 1.3), round(1198 / 1.3))
    assert 0 <= shared(first, second) - round(1024 / 1.3) <= 3
