"""Conversations: each prompt begins with all that was said, turns wait for answers and thought, and stages end them."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import command
from loadtest.errors import LoadTestError
from loadtest.load.runner import run_load_test
from loadtest.mock_server import MockServer
from loadtest.results.records import Record, read_records
from loadtest.settings import load_settings
from loadtest.workloads.distributions import parse_distribution
from loadtest.workloads.prefixes import PrefixPool, parse_prefix_pool
from loadtest.workloads.prompts import WORDS, TokenCost, TokenIdPrompts, WordPrompts

Factory = Callable[..., MockServer]
EARLY_S = 0.002


def settings(out: Path, url: str, *words: str) -> Any:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    common = ["--base-url", url, "--out", str(out), "--no-progress", "--no-server-metrics"]
    return load_settings(parser.parse_args([*common, *words]))


def run(server: MockServer, out: Path, words: str) -> list[Record]:
    run_load_test(settings(out, server.url, *words.split()))
    return list(read_records(out / "records.jsonl"))


def by_conversation(records: list[Record]) -> dict[tuple[bool, int], list[Record]]:
    found: dict[tuple[bool, int], list[Record]] = {}
    for record in sorted(records, key=lambda r: r.intended_unix_s):
        found.setdefault((record.warmup, record.index), []).append(record)
    return found


def test_chat_prompts_grow_by_the_answers(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=10)
    words = (
        "--endpoint chat --concurrency 1 --requests 3 --turns 4 --turn-tokens 7 --prompt-tokens 50 --output-tokens 6"
    )
    records = run(server, tmp_path, words)
    assert [(r.index, r.turn) for r in records] == [(i, turn) for i in range(3) for turn in range(4)]
    sent = [body["messages"] for body in server.requests]
    for i in range(0, 12, 4):
        for before, after in pairwise(sent[i : i + 4]):
            assert after[: len(before)] == before
            answer, question = after[len(before) :]
            assert (answer["role"], len(answer["content"].split())) == ("assistant", 6)
            assert (question["role"], len(question["content"].split())) == ("user", 7)
    # 5 for the template; then 6 of each answer and 7 of each question.
    assert [r.prompt_tokens for r in records[:4]] == [50, 63, 76, 89]
    assert [r.requested_prompt_tokens for r in records[:4]] == [50, None, None, None]
    assert len({messages[0]["content"] for messages in sent}) == 3


def test_completions_grow_as_text(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server()
    run(server, tmp_path, "--requests 1 --turns 3 --prompt-tokens 30 --output-tokens 5")
    prompts = [body["prompt"] for body in server.requests]
    assert len(prompts) == 3
    assert all(after.startswith(before + " lorem ipsum dolor") for before, after in pairwise(prompts))


def test_a_user_of_a_closed_loop_holds_one_conversation_and_thinks(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=30)
    words = "--concurrency 3 --requests 6 --warmup 3 --turns 3 --think-time-ms 100 --output-tokens 2 --seed 1"
    records = run(server, tmp_path, words)
    held = by_conversation(records)
    assert Counter(warmup for warmup, _ in held) == {True: 3, False: 6}
    for turns in held.values():
        assert [r.turn for r in turns] == [0, 1, 2]
        for before, after in pairwise(turns):
            pause = after.intended_unix_s - before.intended_unix_s - before.end_s
            assert pause == pytest.approx(0.1, abs=1e-4)
            assert after.start_s is not None
            assert after.start_s >= -EARLY_S
    # Three users: never more than three conversations at a time.
    edges = sorted(
        edge
        for turns in held.values()
        for edge in ((turns[0].intended_unix_s, 1), (turns[-1].intended_unix_s + turns[-1].end_s, -1))
    )
    assert max(np.cumsum([step for _, step in edges])) <= 3


def test_in_an_open_loop_conversations_arrive_and_their_turns_follow(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=50)
    words = "--rate 20 --arrival constant --requests 8 --turns 3 --think-time-ms 200 --output-tokens 1"
    held = by_conversation(run(server, tmp_path, words))
    assert {index for _, index in held} == set(range(8))
    arrivals = sorted(turns[0].intended_unix_s for turns in held.values())
    assert [b - a for a, b in pairwise(arrivals)] == pytest.approx([0.05] * 7, abs=1e-4)
    assert all([r.turn for r in turns] == [0, 1, 2] for turns in held.values())
    # The first conversation goes on after the last has arrived: turns do not hold up arrivals.
    assert max(r.intended_unix_s for r in held[False, 0]) > arrivals[-1]


def test_no_turn_begins_after_the_end_of_a_stage(mock_server: Factory, tmp_path: Path) -> None:
    for name, load in (("closed", "--concurrency 2"), ("open", "--rate 10 --arrival constant")):
        server = mock_server(ttft_ms=20)
        words = f"{load} --duration 0.6 --turns 100 --think-time-ms 50 --output-tokens 1"
        starts = [r.intended_unix_s for r in run(server, tmp_path / name, words)]
        assert len(starts) > 6
        assert max(starts) - min(starts) <= 0.61


def test_a_failure_ends_its_conversation(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(faults={"http_500": 3})
    records = run(server, tmp_path, "--requests 2 --turns 5 --output-tokens 1")
    assert [(r.index, r.turn, r.error) for r in records] == [
        (0, 0, None),
        (0, 1, None),
        (0, 2, "http_5xx"),
        (1, 0, None),
        (1, 1, None),
        (1, 2, "http_5xx"),
    ]


def test_one_failure_of_many_turns_is_below_the_limit(mock_server: Factory, tmp_path: Path) -> None:
    # One of 15 requests fails: less than 20%, though it is more than 20% of the four conversations.
    server = mock_server(faults={"http_500": 15})
    words = "--requests 4 --turns 4 --output-tokens 1 --max-error-rate 0.2"
    chosen = settings(tmp_path, server.url, *words.split())
    summary = run_load_test(chosen)
    assert (summary.status, summary.stages[0].requests.ok, summary.stages[0].requests.failed) == ("complete", 14, 1)


def test_a_seed_repeats_the_conversations(mock_server: Factory, tmp_path: Path) -> None:
    server, sent = mock_server(), []
    for number, seed in enumerate("112"):
        words = f"--endpoint chat --concurrency 2 --requests 4 --turns uniform:1:4 --output-tokens 2 --seed {seed}"
        run(server, tmp_path / str(number), words)
        sent.append(sorted(json.dumps(body) for body in server.requests))
        server.requests.clear()
    assert sent[0] == sent[1] != sent[2]


def test_share_gpt_is_held_turn_by_turn(mock_server: Factory, tmp_path: Path) -> None:
    talk = [{"from": who, "value": f"{who} {i}"} for i in range(4) for who in ("human", "gpt")]
    (tmp_path / "x.json").write_text(json.dumps([{"conversations": talk}]))
    server = mock_server()
    common = f"--endpoint chat --requests 1 --output-tokens 2 --prompts {tmp_path / 'x.json'}"
    assert [r.turn for r in run(server, tmp_path / "first", common)] == [0]
    assert [r.turn for r in run(server, tmp_path / "three", f"{common} --turns 3")] == [0, 1, 2]
    last = server.requests[-1]["messages"]
    assert [m["content"] for m in last if m["role"] == "user"] == ["human 0", "human 1", "human 2"]
    assert {m["content"] for m in last if m["role"] == "assistant"} == {" lorem ipsum"}


def test_a_trace_is_sent_with_its_lengths(mock_server: Factory, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 100 * i, "input_length": 600 + i, "output_length": 2 + i, "hash_ids": [0, 10 + i]}
        for i in range(4)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server = mock_server()
    records = run(server, tmp_path / "out", f"--requests 4 --trace {tmp_path / 'x.jsonl'}")
    assert [r.prompt_tokens for r in records] == [600, 601, 602, 603]
    assert [r.output_tokens for r in records] == [2, 3, 4, 5]
    # One token is the tokenizer's own, so the first block has 511 words.
    assert len({" ".join(body["prompt"].split()[:511]) for body in server.requests}) == 1
    assert len({" ".join(body["prompt"].split()[511:]) for body in server.requests}) == 4


@pytest.mark.parametrize("kind", ["words", "ids"])
def test_prompts_share_the_prefixes_of_a_pool(kind: str) -> None:
    pool, lengths = parse_prefix_pool("3:40,1:100:1"), parse_distribution("20", "-")
    source: Any = WordPrompts(lengths, pool, TokenCost(1.0, 0.0, WORDS, "known"), 0)
    if kind == "ids":
        source = TokenIdPrompts(lengths, pool, 0, 50_000, 0)
    prompts = [source.prompt(np.random.default_rng(i), i) for i in range(400)]
    units = [p.content.split() if isinstance(p.content, str) else p.content for p in prompts]
    assert all(len(unit) == prompt.tokens for unit, prompt in zip(units, prompts, strict=True))
    used = Counter(tuple(unit[: len(unit) - 20]) for unit in units)
    assert sorted(map(len, used)) == [40, 40, 40, 100]
    # Three weigh 1 each by their count, the fourth 1: so a quarter each. 100 plus or minus 4 standard deviations.
    assert all(65 <= count <= 135 for count in used.values())
    assert len({tuple(unit[-20:]) for unit in units}) == 400


def test_weights_of_a_pool_are_of_all_its_prefixes() -> None:
    pool = parse_prefix_pool("2:10:3, 1:20:1")
    assert (pool.tokens, pool.weights) == ((10, 10, 20), (1.5, 1.5, 1.0))
    drawn = Counter(pool.choose(np.random.default_rng(i)) for i in range(1000))
    assert 210 <= drawn[2] <= 290
    assert PrefixPool((7,)).choose(np.random.default_rng(0)) == 0
    for bad in ("3", "0:5", "x:5", "3:-1", "3:5:0", "3:5:1:1", "3:5:nan", "", "3:5,,"):
        with pytest.raises(LoadTestError, match=r"--prefix-pool .*expected COUNT:TOKENS"):
            parse_prefix_pool(bad)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--turns 3 --endpoint embeddings", "--endpoint embeddings has no conversations"),
        ("--turns 3 --prompt-token-ids 100", "--turns and --prompt-token-ids exclude"),
        ("--turns 0", "--turns 0"),
        ("--turn-tokens 3", "--turn-tokens needs --turns"),
        ("--think-time-ms 3", "--think-time-ms needs --turns"),
        ("--prompt-column x", "--prompt-column needs --prompts"),
        ("--trace a --prompts b", "--prompts and --trace exclude"),
        ("--trace a --prefix-pool 1:2", "--trace and --prefix-pool exclude"),
        ("--prefix-tokens 3 --prefix-pool 1:2", "--prefix-tokens and --prefix-pool exclude"),
        ("--trace-format otel", "--trace-format needs --trace"),
        ("--prompt-token-ids 9 --endpoint responses", "needs --endpoint completions"),
        ("--ca-cert /nowhere.pem", "--ca-cert /nowhere.pem: No such file or directory; expected a PEM file"),
        ("--ca-cert x --insecure", "--ca-cert and --insecure exclude"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path: Path, words: str, why: str) -> None:
    with pytest.raises(LoadTestError, match=why):
        settings(tmp_path, "http://127.0.0.1:1", *words.split())
