"""A data set is understood or refused in one line, whatever its name; none is ever sent as its own source text."""

from __future__ import annotations

import base64
import csv
import gzip
import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.endpoint.apis.registry import APIS
from loadtest.errors import LoadTestError
from loadtest.workloads.datasets import Columns, DatasetPrompts, load_prompts
from loadtest.workloads.distributions import parse_distribution
from loadtest.workloads.prompt import Prompt
from loadtest.workloads.workload import Workload

COMPLETIONS, CHAT = APIS["completions"], APIS["chat"]
ROWS: list[dict[str, Any]] = [{"prompt": "one, two\nthree", "max_tokens": 3}, {"prompt": 'a "b"', "max_tokens": 4}]
SHARE_GPT = [
    {"from": "system", "value": "be brief"},
    {"from": "human", "value": "first"},
    {"from": "gpt", "value": "one two three"},
    {"from": "human", "value": "second"},
    {"from": "gpt", "value": "four"},
]


def table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    arrow, writer = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    sink = io.BytesIO()
    writer.write_table(arrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


LINES = "\n".join(map(json.dumps, ROWS)).encode()


def write(tmp_path: Path, name: str, data: bytes) -> str:
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


def asked(workload: Workload, index: int = 0) -> dict[str, Any]:
    body = json.loads(workload.request(0, index).body)
    assert isinstance(body, dict)
    return body


def workload(prompts: list[Prompt], endpoint: str = "chat", turns: str | None = None, **more: Any) -> Workload:
    source = DatasetPrompts(prompts, parse_distribution(turns, "-") if turns else None)
    return Workload(APIS[endpoint], "m", source, parse_distribution("50", "-"), False, None, {}, 0, **more)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", LINES),
        ("x.JSONL", LINES + b"\n\n"),
        ("x.ndjson", LINES),
        ("x.json", json.dumps(ROWS).encode()),
        ("x.json", json.dumps({"data": ROWS}, indent=1).encode()),
        ("x.json", LINES),
        ("x.csv", table(",")),
        ("x.CSV", b"\xef\xbb\xbf" + table(",")),
        ("x.tsv", table("\t")),
        ("no-suffix", LINES),
        ("no-suffix", json.dumps(ROWS).encode()),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str, data: bytes) -> None:
    prompts = load_prompts(write(tmp_path, name, data), COMPLETIONS)
    assert [(p.content, p.max_tokens) for p in prompts] == [(r["prompt"], r["max_tokens"]) for r in ROWS]


@pytest.mark.parametrize("name", ["x.parquet", "X.PARQUET", "x.txt", "no-suffix"])
def test_parquet_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    prompts = load_prompts(write(tmp_path, name, parquet(ROWS)), COMPLETIONS)
    assert [(p.content, p.max_tokens) for p in prompts] == [(r["prompt"], r["max_tokens"]) for r in ROWS]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    path = write(tmp_path, "x.parquet", b"PAR1 and more")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(LoadTestError, match=r"needs pyarrow: pip install 'vllm-pareto\[loadtest\]'"):
        load_prompts(path, COMPLETIONS)


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path, "x.TXT", b"one\n\n two \n{a} b\n"), COMPLETIONS)
    assert [p.content for p in prompts] == ["one", "two", "{a} b"]
    source = DatasetPrompts(prompts)
    assert [source.prompt(np.random.default_rng(0), i).content for i in range(4)] == ["one", "two", "{a} b", "one"]


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("x.txt", LINES, "holds JSON.*name it .jsonl"),
        ("x.txt", json.dumps(ROWS, indent=1).encode(), "holds JSON"),
        ("x.xlsx", b"PK\x03\x04rest", r"packed \(zip\); unpack"),
        ("x.jsonl.gz", gzip.compress(LINES), r"packed \(gzip\)"),
        ("x.yaml", b"prompt: x", "unknown format '.yaml'; expected .txt"),
        ("x.pkl", b"\x80\x04\0\0", "not UTF-8|binary"),
        ("x.txt", b"a\0b", "a binary file"),
        ("x.parquet", b"PRA1", "not a Parquet file"),
        ("x.csv", b"prompt,max_tokens\na,1\nb\n", r"x.csv:3: 1 fields, but the header has 2"),
        ("x.csv", b'prompt\n"a\n', "x.csv:"),
        ("x.csv", b"prompt,prompt\na,b\n", "comes twice"),
        ("x.csv", b"prompt\n", "no rows"),
        ("x.csv", b"prompt,max_tokens\na,many\n", "x.csv:2: max_tokens must be a whole number, at least 1, not 'many'"),
        ("x.csv", b"question\na\n", "x.csv:2: expected prompt .* --prompt-column; it has: question"),
        ("x.json", b'{"a": ', "not JSON"),
        ("x.json", b'"text"', "expected a list"),
        ("x.json", b'[{"prompt": "a"}, 7]', "row 2: expected an object"),
        ("x.json", b"[]", "no rows"),
        ("x.jsonl", b"", "no rows"),
        ("x.txt", b"\n \n", "no rows"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    with pytest.raises(LoadTestError, match=why) as error:
        load_prompts(write(tmp_path, name, data), COMPLETIONS)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--prompts ")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[1]", "an object"),
        ('{"question": "x"}', "expected prompt"),
        ('{"prompt": ""}', "expected prompt"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens.*not True"),
        ('{"prompt": "x", "max_tokens": 1.5}', "max_tokens"),
        ('{"prompt": [1, true]}', "expected prompt"),
        ('{"prompt": [1, -2]}', "expected prompt"),
        ('{"prompt": true}', "expected prompt"),
        ('{"messages": [{"role": "user"}]}', "--endpoint chat"),
        ('{"conversations": [{"from": "gpt", "value": "a"}]}', "nothing from human"),
        ('{"conversations": [{"from": "human", "value": 7}]}', "no text"),
        ('{"conversations": "hello"}', "list of objects"),
        ('{"prompt": "x", "extra_body": 7}', "extra_body must be an object"),
        ('{"hash_ids": [1], "input_length": 3}', "give it with --trace"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = write(tmp_path, "prompts.jsonl", f'{{"prompt": "fine"}}\n{line}\n'.encode())
    with pytest.raises(LoadTestError, match=why) as error:
        load_prompts(path, COMPLETIONS)
    assert "prompts.jsonl:2" in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="No such file"):
        load_prompts(str(tmp_path / "none.txt"), COMPLETIONS)
    with pytest.raises(LoadTestError, match="Is a directory"):
        load_prompts(str(tmp_path), COMPLETIONS)


def test_columns_are_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", b"prompt,question,length\nno,yes,7\n")
    (prompt,) = load_prompts(path, COMPLETIONS, Columns("question", "length"))
    assert (prompt.content, prompt.max_tokens) == ("yes", 7)
    with pytest.raises(LoadTestError, match="no column 'answer'; it has: prompt, question, length"):
        load_prompts(path, COMPLETIONS, Columns("answer"))
    with pytest.raises(LoadTestError, match="no column 'n'"):
        load_prompts(path, COMPLETIONS, Columns("question", "n"))


def test_columns_with_gaps_have_no_length(tmp_path: Path) -> None:
    # A column of whole numbers with gaps becomes one of floats in many tools.
    data = b"prompt,max_tokens\na,3.0\nb,\n"
    assert [p.max_tokens for p in load_prompts(write(tmp_path, "x.csv", data), COMPLETIONS)] == [3, None]


def test_token_ids_need_an_endpoint_that_takes_them(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", b'{"prompt": [1, 2, 3]}')
    (prompt,) = load_prompts(path, COMPLETIONS)
    assert (prompt.content, prompt.tokens) == ([1, 2, 3], 3)
    with pytest.raises(LoadTestError, match="token ids need --endpoint completions"):
        load_prompts(path, CHAT)


def test_messages_tools_and_images_pass_through_untouched(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "system", "content": "a"},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "https://host/x.png", "detail": "low"}}],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    row = {"messages": messages, "tools": tools, "tool_choice": "auto", "extra_body": {"top_p": 0.5}, "id": "kept out"}
    body = asked(workload(load_prompts(write(tmp_path, "x.jsonl", json.dumps(row).encode()), CHAT)))
    assert body["messages"] == messages
    assert (body["tools"], body["tool_choice"], body["top_p"]) == (tools, "auto", 0.5)
    assert "id" not in body


def test_local_images_are_put_into_the_request(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG data")
    row = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}]}
    path = write(tmp_path, "x.jsonl", json.dumps(row).encode())
    (part,) = asked(workload(load_prompts(path, CHAT)))["messages"][0]["content"]
    kind, _, data = part["image_url"]["url"].partition(";base64,")
    assert (kind, base64.b64decode(data)) == ("data:image/png", b"\x89PNG data")
    (tmp_path / "x.png").unlink()
    with pytest.raises(LoadTestError, match=r"x.jsonl:1: image_url .*x.png: No such file"):
        load_prompts(path, CHAT)


def test_messages_in_parquet_lose_the_fields_that_others_have(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    path = write(tmp_path, "x.parquet", parquet([{"messages": messages, "max_tokens": None}]))
    assert asked(workload(load_prompts(path, CHAT)))["messages"] == messages


def test_share_gpt_sends_its_first_question(tmp_path: Path) -> None:
    path = write(tmp_path, "x.json", json.dumps([{"id": "a", "conversations": SHARE_GPT}]).encode())
    assert asked(workload(load_prompts(path, CHAT)))["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
    ]
    made = workload(load_prompts(path, COMPLETIONS), "completions")
    assert asked(made)["prompt"] == "be brief\n\nfirst"
    assert asked(made)["max_tokens"] == 50


def test_recorded_answers_give_the_lengths_where_a_tokenizer_can_tell(tmp_path: Path) -> None:
    path = write(tmp_path, "x.json", json.dumps([{"conversations": SHARE_GPT}]).encode())
    made = workload(
        load_prompts(path, CHAT), turns="9", count_tokens=lambda text: len(text.split()), recorded_lengths=True
    )
    conversation = made.conversation(0, 0)
    assert json.loads(conversation.request().body)["max_tokens"] == 3
    following = conversation.proceed("anything")
    assert following is not None
    assert json.loads(following.body)["max_tokens"] == 1


def test_recorded_messages_become_turns_that_the_server_answers(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "recorded"},
        {"role": "user", "content": "u2"},
        call,
        result,
        {"role": "assistant", "content": "it is 42"},
        {"role": "user", "content": "u3"},
        {"role": "assistant", "content": "recorded last"},
    ]
    path = write(tmp_path, "x.jsonl", json.dumps({"messages": messages}).encode())
    conversation = workload(load_prompts(path, CHAT, turns=True), turns="9").conversation(0, 0)
    sent = [json.loads(conversation.request().body)["messages"]]
    for answer in ("live 1", "live 2", "live 3"):
        request = conversation.proceed(answer)
        if request is not None:
            sent.append(json.loads(request.body)["messages"])
    live = {"role": "assistant", "content": "live 1"}
    assert sent[0] == messages[:2]
    assert sent[1] == [*messages[:2], live, messages[3]]
    # The results of tools fit the recorded calls only, so those stay.
    assert sent[2] == [*messages[:2], live, *messages[3:8]]
    assert len(sent) == 3
    assert [p.content for p in load_prompts(path, CHAT)] == [messages]


def test_a_hub_data_set_is_read_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # A local folder goes the same way through the library as a name on the hub does.
    write(tmp_path, "train.jsonl", b'{"q": "a", "n": 3}\n{"q": "b", "n": 4}\n')
    prompts = load_prompts(f"hf:{tmp_path}", COMPLETIONS, Columns("q", "n"))
    assert [(p.content, p.max_tokens) for p in prompts] == [("a", 3), ("b", 4)]
    with pytest.raises(LoadTestError, match=r"--prompts hf:.*test"):
        load_prompts(f"hf:{tmp_path}", COMPLETIONS, split="test")
