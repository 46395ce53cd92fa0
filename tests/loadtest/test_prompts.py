from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loadtest.errors import LoadTestError
from loadtest.workloads.distributions import parse_distribution
from loadtest.workloads.prompts import (
    WORDS,
    FilePrompts,
    PromptSource,
    TokenCost,
    TokenIdPrompts,
    WordPrompts,
    parse_token_id_range,
    read_prompts,
)
from loadtest.workloads.workload import Workload

COST = TokenCost(1.0, 1.0, WORDS, "known")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def workload(source: object, chat: bool = False, **changes: object) -> Workload:
    values: dict = {
        "chat": chat,
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
    source = WordPrompts(parse_distribution("uniform:50:90", "-"), 30, COST, seed=1)
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
    prompt = WordPrompts(parse_distribution("304", "-"), 0, cost, seed=1).prompt(rng(), 0)
    assert len(str(prompt.content).split()) == 200


def test_token_id_prompts_are_exact_and_in_range() -> None:
    source = TokenIdPrompts(parse_distribution("64", "-"), 16, 100, 200, seed=1)
    first, second = source.prompt(rng(1), 0), source.prompt(rng(2), 1)
    assert first.tokens == len(first.content) == 80
    assert first.content[:16] == second.content[:16]
    assert first.content != second.content
    assert all(isinstance(i, int) and 100 <= i < 200 for i in first.content)


def test_a_request_depends_on_seed_stage_and_number_alone() -> None:
    source = WordPrompts(parse_distribution("uniform:20:80", "-"), 0, COST, seed=7)
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
    source = WordPrompts(parse_distribution("20", "-"), 0, COST, seed=7)
    plain = json.loads(workload(source).request(0, 0).body)
    assert isinstance(plain["prompt"], str)
    assert plain["stream"] is True
    assert plain["stream_options"] == {"include_usage": True}
    assert plain["ignore_eos"] is True
    chat = json.loads(workload(source, chat=True, ignore_eos=False, temperature=None).request(0, 0).body)
    assert chat["messages"][0]["role"] == "user"
    assert not {"prompt", "ignore_eos", "temperature"} & set(chat)


def test_extra_body_overrides() -> None:
    source = WordPrompts(parse_distribution("20", "-"), 0, COST, seed=7)
    request = workload(source, extra_body={"top_p": 0.5, "max_tokens": 9}).request(0, 0)
    assert json.loads(request.body)["top_p"] == 0.5
    assert request.output_tokens == json.loads(request.body)["max_tokens"] == 9


def test_prompts_from_a_text_file_start_over(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \n", encoding="utf-8")
    source = FilePrompts(read_prompts(path, chat=False))
    assert [source.prompt(rng(), i).content for i in range(3)] == ["one", "two", "one"]


def test_prompts_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    lines = [{"prompt": "p", "max_tokens": 3}, {"messages": messages}, {"text": "t"}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    prompts = read_prompts(path, chat=True)
    assert [p.content for p in prompts] == ["p", messages, "t"]
    work = workload(FilePrompts(prompts), chat=True)
    assert json.loads(work.request(0, 0).body)["max_tokens"] == 3
    assert json.loads(work.request(0, 1).body)["messages"] == messages


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[1]", "an object"),
        ('{"question": "x"}', "expected prompt"),
        ('{"prompt": ""}', "expected prompt"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"messages": [{"role": "user"}]}', "--endpoint chat"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(LoadTestError, match=why) as error:
        read_prompts(path, chat=False)
    assert "prompts.jsonl:2" in str(error.value)


def test_missing_and_empty_prompt_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="No such file"):
        read_prompts(tmp_path / "none.txt", chat=False)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(LoadTestError, match="no prompts"):
        read_prompts(tmp_path / "empty.txt", chat=False)


def test_token_id_ranges() -> None:
    assert parse_token_id_range("32000") == (0, 32000)
    assert parse_token_id_range("100:200") == (100, 200)
    for bad in ("0", "200:100", "x", "-5:9", "1:2:3"):
        with pytest.raises(LoadTestError, match="--prompt-token-ids"):
            parse_token_id_range(bad)


@pytest.mark.parametrize("kind", ["words", "ids"])
def test_short_prompts_are_unique_within_and_across_stages(kind: str) -> None:
    # Drawn freely, 600 prompts of 12 ** 3 ids, or of two random words, would hold about 90, or 8, equal pairs.
    source: PromptSource = TokenIdPrompts(parse_distribution("3", "-"), 0, 0, 12, 0)
    if kind == "words":
        source = WordPrompts(parse_distribution("4", "-"), 0, COST, 0)
    made = workload(source)
    stages = [(stage, index, warmup) for stage in range(3) for index in range(100) for warmup in (False, True)]
    prompts = [str(json.loads(made.request(*each).body)["prompt"]) for each in stages]
    assert len(set(prompts)) == len(stages)
    assert prompts == [str(json.loads(made.request(*each).body)["prompt"]) for each in stages]
