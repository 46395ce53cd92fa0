"""Every endpoint end to end, against a server that speaks as the real ones do and does not count tokens on demand."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loadtest import clock, command
from loadtest.endpoint.apis.registry import APIS, PATHS
from loadtest.endpoint.client import Client
from loadtest.endpoint.token_count import LocalCounter, ServerCounter, read_tokenizer
from loadtest.errors import LoadTestError
from loadtest.load.runner import run_load_test
from loadtest.mock_server import MockServer
from loadtest.results.records import Record, read_records
from loadtest.results.schema import Summary
from loadtest.settings import load_settings

Factory = Callable[..., MockServer]


def run(url: str, out: Path, *words: str) -> tuple[Summary, list[Record]]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    common = ["--base-url", url, "--out", str(out), "--no-progress", "--no-server-metrics"]
    summary = run_load_test(load_settings(parser.parse_args([*common, *words])))
    return summary, list(read_records(out / "records.jsonl"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.tokenizes = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send({"object": "list", "data": [{"id": "m", "owned_by": "somebody"}]})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize" and self.server.tokenizes:
            text = body.get("prompt") or body["messages"][0]["content"]
            self._send({"count": 2 + len(text.split()), "token_strs": [f" {word}" for word in text.split()]})
            return
        if self.path not in PATHS.values():
            self.send_error(404)
            return
        self.server.bodies.append({"path": self.path, **body})
        self._send(self.server.answer(body))

    def _send(self, answer: Any) -> None:
        stream = isinstance(answer, list)
        data = "".join(answer).encode() if stream else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Any]) -> Iterator[_Server]:
    server = _Server(answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def words_in(content: Any) -> int:
    if isinstance(content, str):
        return 3 + len(content.split())
    return sum(words_in(each["content"]) for each in content) if isinstance(content[0], dict) else len(content)


def event(kind: str, **data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def responses(body: dict[str, Any]) -> Any:
    """What vLLM and OpenAI send: typed events, and no [DONE]."""
    usage = {"input_tokens": words_in(body["input"]), "output_tokens": body["max_output_tokens"]}
    usage["input_tokens_details"] = {"cached_tokens": 2}  # type: ignore[assignment]
    done = {
        "status": "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"},
        "usage": usage,
        "error": None,
    }
    if not body.get("stream"):
        return done
    return [
        event("response.created", response={"status": "in_progress", "usage": None}),
        event("response.reasoning_text.delta", delta="hm"),
        event("response.output_text.delta", delta="Hello "),
        event("response.output_text.delta", delta="there"),
        event("response.output_text.done", text="Hello there"),
        event("response.incomplete", response=done),
    ]


def test_responses(tmp_path: Path) -> None:
    with serving(responses) as server:
        words = "--endpoint responses --requests 3 --output-tokens 9 --prompt-tokens 40 --turns 2 --turn-tokens 6"
        summary, records = run(server.url, tmp_path, *words.split())
        stage = summary.stages[0]
        assert (stage.requests.ok, stage.failures, stage.finish_reasons) == (6, {}, {"length": 6})
        assert [(r.output_tokens, r.cached_tokens, len(r.token_s)) for r in records] == [(9, 2, 3)] * 6
        first = [r for r in records if r.turn == 0]
        assert [r.prompt_tokens for r in first] == [r.requested_prompt_tokens for r in first] == [40] * 3
        assert [r.tpot_s for r in records] == [(r.last_token_s - r.first_token_s) / 8 for r in records]  # type: ignore[operator]
        sent = [body for body in server.bodies if body.get("stream")]
        assert all(body["path"] == "/v1/responses" and body["max_output_tokens"] == 9 for body in sent)
        assert all("max_tokens" not in body and "stream_options" not in body for body in sent)
        # What was only thought is no part of what is said again.
        assert sent[1]["input"][1] == {"role": "assistant", "content": "Hello there"}
        assert (sent[1]["input"][0], len(sent[1]["input"])) == (sent[0]["input"][0], 3)


def test_responses_cost_what_they_report_themselves(tmp_path: Path) -> None:
    # As vLLM does it: /tokenize renders messages for a chat, and responses add something else to them.
    with serving(responses) as server:
        server.tokenizes = True
        words = "--endpoint responses --requests 2 --prompt-tokens 40"
        summary, records = run(server.url, tmp_path, *words.split())
        assert [r.prompt_tokens for r in records] == [40, 40]
        assert summary.calibration["how"].startswith("/tokenize, words of one token, and usage")


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([event("response.failed", response={"error": {"message": "planted"}})], "stream_error"),
        ([event("error", message="planted")], "stream_error"),
        ([event("response.output_text.delta", delta="a")], "stream_cut"),
        ([event("response.completed", response={"usage": {"input_tokens": 1, "output_tokens": 0}})], "empty_response"),
    ],
)
def test_responses_that_fail_have_their_class(events: list[str], kind: str) -> None:
    record = Record(0, 0)
    with serving(lambda _: events) as server:
        Client(server.url, 10).stream(PATHS["responses"], b"{}", record, clock.now())
    assert record.error == kind
    if kind == "stream_error":
        assert "planted" in str(record.message)


def embeddings(body: dict[str, Any]) -> Any:
    return {
        "data": [{"index": 0, "embedding": [0.5, 0.25]}],
        "usage": {"prompt_tokens": words_in(body["input"]), "total_tokens": 9},
    }


def test_embeddings_have_no_tokens_of_their_own(tmp_path: Path) -> None:
    with serving(embeddings) as server:
        summary, records = run(
            server.url,
            tmp_path,
            *["--endpoint", "embeddings", "--requests", "4", "--prompt-tokens", "30", "--goodput", "e2el:60000"],
        )
        stage = summary.stages[0]
        assert (stage.requests.ok, stage.failures, stage.notes) == (4, {}, [])
        assert (stage.latency.ttft_ms, stage.latency.tpot_ms, stage.latency.itl_ms) == (None, None, None)
        assert stage.latency.e2e_ms is not None
        assert stage.latency.e2e_ms.count == 4
        assert stage.prompt_tokens is not None
        assert (stage.prompt_tokens.mean, stage.prompt_tokens.requested_mean) == (30, 30)
        assert stage.throughput is not None
        assert (stage.throughput.output_tokens_per_s, stage.tokens_per_chunk) == (0, None)
        assert stage.goodput is not None
        assert stage.goodput.fraction == 1
        assert [r.first_token_s for r in records] == [None] * 4
        assert all(set(body) == {"path", "model", "input"} for body in server.bodies[2:])


def test_an_embedding_that_is_none_is_a_failure() -> None:
    for answer, kind in ({"data": []}, "empty_response"), ({"error": {"message": "x"}}, "stream_error"):
        record = Record(0, 0)
        with serving(lambda _, answer=answer: answer) as server:  # type: ignore[misc]
            Client(server.url, 10).stream(PATHS["embeddings"], b"{}", record, clock.now())
        assert record.error == kind


def test_calls_of_tools_are_generated_and_have_no_text_to_count() -> None:
    delta = {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}
    chunks = [f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': 'tool_calls'}]})}\n\n"]
    record = Record(0, 0)
    with serving(lambda _: chunks) as server:
        answer = Client(server.url, 10).stream(PATHS["chat"], b"{}", record, clock.now())
    assert (record.outcome, len(record.token_s), answer.text, answer.generated) == ("ok", 1, "", None)


def test_an_endpoint_is_one_line_in_the_registry() -> None:
    assert list(APIS) == ["completions", "chat", "responses", "embeddings"]
    assert len(set(PATHS.values())) == len(PATHS)


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,
    "truncation": None,
    "padding": None,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


def test_a_server_without_usage_is_counted_by_its_tokenizer(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(ttft_ms=50, itl_ms=10, tokens_per_chunk=4, usage=False)
    summary, records = run(server.url, tmp_path / "out", *["--requests", "2", "--output-tokens", "21"])
    stage = summary.stages[0]
    assert [(r.output_tokens, r.retokenized_output_tokens, len(r.token_s)) for r in records] == [(None, 21, 6)] * 2
    assert stage.tokens_per_chunk == 3.5
    assert stage.latency.tpot_ms is not None
    # The first chunk comes with the 4th token, at 80 ms, the last with the 21st, at 250 ms. By chunks it would be 34.
    assert stage.latency.tpot_ms.min == pytest.approx(170 / 20, abs=4)
    assert stage.throughput is not None
    assert stage.throughput.output_tokens_per_s == pytest.approx(42 / stage.throughput.window_s)
    assert stage.throughput.total_tokens_per_s is None
    assert any("tokenized again" in note for note in stage.notes)


@pytest.mark.parametrize("chat", [False, True])
def test_a_local_tokenizer_counts_where_the_server_says_nothing(
    mock_server: Factory, tmp_path: Path, tokenizer: Path, chat: bool
) -> None:
    server = mock_server(tokens_per_chunk=4, usage=False, tokenize=False)
    words = ["--requests", "2", "--output-tokens", "21", "--tokenizer", str(tokenizer), "--prompt-tokens", "50"]
    summary, records = run(server.url, tmp_path / "out", *words, *(["--endpoint", "chat"] if chat else []))
    assert [r.counted_output_tokens for r in records] == [21, 21]
    assert summary.calibration["how"] == "--tokenizer"
    lengths = {len((body["messages"][0]["content"] if chat else body["prompt"]).split()) for body in server.requests}
    assert lengths == {50}


def test_what_nobody_counts_is_undefined(mock_server: Factory, tmp_path: Path) -> None:
    server = mock_server(tokens_per_chunk=4, usage=False, tokenize=False)
    words = "--requests 2 --output-tokens 21 --prompt-token-ids 1000 --goodput ttft:60000"
    summary, records = run(server.url, tmp_path, *words.split())
    stage = summary.stages[0]
    assert [r.counted_output_tokens for r in records] == [None, None]
    assert (stage.latency.tpot_ms, stage.output_tokens, stage.tokens_per_chunk) == (None, None, None)
    assert stage.throughput is not None
    assert stage.throughput.output_tokens_per_s is None
    assert any("--tokenizer" in note for note in stage.notes)
    document = json.loads((tmp_path / "summary.json").read_text())
    assert document["stages"][0]["throughput"]["output_tokens_per_s"] is None


def test_the_servers_count_leaves_out_what_begins_every_sequence(mock_server: Factory) -> None:
    counter = ServerCounter(Client(mock_server().url, 10), "mock-model")
    assert [counter("one"), counter("one extraordinary"), counter("a b c d")] == [1, 3, 4]
    missing = ServerCounter(Client(mock_server(tokenize=False).url, 10), "mock-model")
    assert [missing("one"), missing("two")] == [None, None]


def test_a_tokenizer_that_is_none_is_refused_in_one_line(tmp_path: Path, tokenizer: Path) -> None:
    assert LocalCounter(read_tokenizer(tokenizer))("one two") == 2
    assert LocalCounter(read_tokenizer(tokenizer / "tokenizer.json"))("one two three") == 3
    (tmp_path / "bad.json").write_text('{"model": 7}')
    for path, why in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "no such file"),
        (tmp_path / "bad.json", "not a tokenizer.json"),
    ):
        with pytest.raises(LoadTestError, match=why) as error:
            read_tokenizer(path)
        assert "\n" not in str(error.value)
