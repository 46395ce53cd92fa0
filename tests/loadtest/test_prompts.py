from __future__ import annotations

import json

import numpy as np
import pytest

from loadtest.endpoint.apis.registry import APIS
from loadtest.errors import LoadTestError
from loadtest.workloads.distributions import parse_distribution
from loadtest.workloads.prefixes import PrefixPool
from loadtest.workloads.prompt import PromptSource
from loadtest.workloads.prompts import (
    WORDS,
    TokenCost,
    TokenIdPrompts,
    WordPrompts,
    parse_token_id_range,
)
from loadtest.workloads.workload import Workload

COST = TokenCost(1.0, 1.0, WORDS, "known")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def workload(source: object, endpoint: str = "completions", **changes: object) -> Workload:
    values: dict = {
        "endpoint": APIS[endpoint],
        "model": "m",
        "source": source,
        "output_lengths": parse_distribution("uniform:5:500", "-"),
        "ignore_eos": True,
        "temperature": 0.0,
        "extra_body": {},
        "seed": 7,
    }
    return Workload(**(values | changes))


def test_word_prompts_have_the_wanted_length_and_a_shared_prefix() -> None:
    source = WordPrompts(parse_distribution("uniform:50:90", "-"), PrefixPool((30,)), COST, seed=1)
    first, second = source.prompt(rng(1), 0), source.prompt(rng(2), 1)
    for prompt in (first, second):
        words = str(prompt.content).split()
        assert prompt.tokens is not None
        assert 80 <= prompt.tokens <= 120
        assert len(words) + 1 == prompt.tokens
    assert str(first.content).split()[:30] == str(second.content).split()[:30]
    assert str(first.content).split()[30:60] != str(second.content).split()[30:60]


def test_words_costing_more_than_a_token_make_shorter_prompts() -> None:
    cost = TokenCost(1.5, 4.0, WORDS, "known")
    prompt = WordPrompts(parse_distribution("304", "-"), PrefixPool((0,)), cost, seed=1).prompt(rng(), 0)
    assert len(str(prompt.content).split()) == 200


def test_token_id_prompts_are_exact_and_in_range() -> None:
    source = TokenIdPrompts(parse_distribution("64", "-"), PrefixPool((16,)), 100, 200, seed=1)
    first, second = source.prompt(rng(1), 0), source.prompt(rng(2), 1)
    assert first.tokens == len(first.content) == 80
    assert first.content[:16] == second.content[:16]
    assert first.content != second.content
    assert all(isinstance(i, int) and 100 <= i < 200 for i in first.content)


def test_a_request_depends_on_seed_stage_and_number_alone() -> None:
    source = WordPrompts(parse_distribution("uniform:20:80", "-"), PrefixPool((0,)), COST, seed=7)
    work = workload(source)
    assert work.request(1, 5).body == work.request(1, 5).body
    others = [
        work.request(1, 6),
        work.request(2, 5),
        work.request(1, 5, warmup=True),
        work.request(1, 5, stream_id=1),
        workload(source, seed=8).request(1, 5),
    ]
    assert all(other.body != work.request(1, 5).body for other in others)


def test_bodies_of_both_endpoints() -> None:
    source = WordPrompts(parse_distribution("20", "-"), PrefixPool((0,)), COST, seed=7)
    plain = json.loads(workload(source).request(0, 0).body)
    assert isinstance(plain["prompt"], str)
    assert plain["stream"] is True
    assert plain["stream_options"] == {"include_usage": True}
    assert plain["ignore_eos"] is True
    chat = json.loads(workload(source, endpoint="chat", ignore_eos=False, temperature=None).request(0, 0).body)
    assert chat["messages"][0]["role"] == "user"
    assert not {"prompt", "ignore_eos", "temperature"} & set(chat)


def test_extra_body_overrides() -> None:
    source = WordPrompts(parse_distribution("20", "-"), PrefixPool((0,)), COST, seed=7)
    request = workload(source, extra_body={"top_p": 0.5, "max_tokens": 9}).request(0, 0)
    assert json.loads(request.body)["top_p"] == 0.5
    assert request.output_tokens == json.loads(request.body)["max_tokens"] == 9


def test_token_id_ranges() -> None:
    assert parse_token_id_range("32000") == (0, 32000)
    assert parse_token_id_range("100:200") == (100, 200)
    for bad in ("0", "200:100", "x", "-5:9", "1:2:3"):
        with pytest.raises(LoadTestError, match="--prompt-token-ids"):
            parse_token_id_range(bad)


@pytest.mark.parametrize("kind", ["words", "ids"])
def test_short_prompts_are_unique_within_and_across_stages(kind: str) -> None:
    # Drawn freely, 600 prompts of 12 ** 3 ids, or of two random words, would hold about 90, or 8, equal pairs.
    source: PromptSource = TokenIdPrompts(parse_distribution("3", "-"), PrefixPool((0,)), 0, 12, 0)
    if kind == "words":
        source = WordPrompts(parse_distribution("4", "-"), PrefixPool((0,)), COST, 0)
    made = workload(source)
    stages = [(stage, index, warmup) for stage in range(3) for index in range(100) for warmup in (False, True)]
    prompts = [str(json.loads(made.request(*each).body)["prompt"]) for each in stages]
    assert len(set(prompts)) == len(stages)
    assert prompts == [str(json.loads(made.request(*each).body)["prompt"]) for each in stages]
