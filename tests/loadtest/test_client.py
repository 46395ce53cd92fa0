"""Planted delays come out as they were planted, and every planted fault is counted in its class.

Delays have exact lower bounds; upper bounds are wide, because a loaded machine may be late but never early.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import gevent
import pytest

from loadtest import clock
from loadtest.endpoint.apis.registry import PATHS
from loadtest.endpoint.client import Client, error_message, normalize_base_url, retry_after
from loadtest.errors import LoadTestError
from loadtest.mock_server import MockServer
from loadtest.results.records import CANCELLED, Record

EARLY_S, LATE_S = 0.002, 0.2


def send(url: str, tokens: int = 6, chat: bool = False, timeout: float = 10.0, **extra: Any) -> Record:
    client = Client(url, timeout)
    body: dict[str, Any] = {"model": "mock-model", "max_tokens": tokens, "stream": True, **extra}
    body["stream_options"] = {"include_usage": True}
    body |= {"messages": [{"role": "user", "content": "a b c"}]} if chat else {"prompt": "a b c"}
    record = Record(0, 0)
    client.stream(PATHS["chat" if chat else "completions"], json.dumps(body).encode(), record, clock.now())
    client.close()
    return record


@contextmanager
def raw_server(*parts: bytes, reset: bool = False) -> Iterator[str]:
    """A server that sends these bytes, whatever it is asked, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(1 << 16)
        for part in parts:
            connection.sendall(part)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join(5)
        listener.close()


def event_stream(*events: str, chunked: bool = False) -> bytes:
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body if not chunked else head + b"\r\n" + body


@pytest.mark.parametrize("chat", [False, True])
def test_planted_delays_are_measured(mock_server: Callable[..., MockServer], chat: bool) -> None:
    record = send(mock_server(ttft_ms=200, itl_ms=30).url, tokens=6, chat=chat)
    assert record.outcome == "ok"
    assert record.first_token_s is not None
    assert record.last_token_s is not None
    assert 0.2 - EARLY_S <= record.first_token_s <= 0.2 + LATE_S
    assert len(record.token_s) == 6
    for number, arrived in enumerate(record.token_s):
        assert 0.2 + 0.03 * number - EARLY_S <= arrived <= 0.2 + 0.03 * number + LATE_S
    assert record.last_token_s <= record.end_s
    assert (record.output_tokens, record.prompt_tokens) == (6, 8 if chat else 4)
    assert record.finish_reason == "length"


def test_first_token_is_the_first_with_content(mock_server: Callable[..., MockServer]) -> None:
    # The chat endpoint sends the role at once, long before the first token.
    record = send(mock_server(ttft_ms=150).url, chat=True)
    assert record.first_token_s is not None
    assert record.first_token_s >= 0.15 - EARLY_S


def test_latency_counts_from_the_intended_start(mock_server: Callable[..., MockServer]) -> None:
    client, record = Client(mock_server(ttft_ms=50).url, 10), Record(0, 0)
    body = json.dumps({"model": "mock-model", "prompt": "a", "max_tokens": 2, "stream": True}).encode()
    client.stream(PATHS["completions"], body, record, clock.now() - 0.5)
    assert record.start_s is not None
    assert record.start_s >= 0.5
    assert record.first_token_s is not None
    assert record.first_token_s >= 0.55 - EARLY_S


def test_several_tokens_a_chunk(mock_server: Callable[..., MockServer]) -> None:
    record = send(mock_server(itl_ms=10, tokens_per_chunk=4).url, tokens=10)
    assert (len(record.token_s), record.output_tokens) == (3, 10)


def test_without_usage_the_record_says_so(mock_server: Callable[..., MockServer]) -> None:
    record = send(mock_server(usage=False).url)
    assert record.outcome == "ok"
    assert record.output_tokens is None
    assert (record.counted_output_tokens, record.tpot_s) == (None, None)


@pytest.mark.parametrize(
    ("fault", "kind", "status"),
    [
        ("http_400", "http_4xx", 400),
        ("http_404", "http_4xx", 404),
        ("http_429", "http_429", 429),
        ("http_500", "http_5xx", 500),
        ("http_503", "http_5xx", 503),
        ("reset", "connection_error", None),
        ("cut", "stream_cut", 200),
        ("malformed", "malformed_sse", 200),
        ("error_event", "stream_error", 200),
        ("empty", "empty_response", 200),
    ],
)
def test_every_planted_fault_has_its_class(
    mock_server: Callable[..., MockServer], fault: str, kind: str, status: int | None
) -> None:
    record = send(mock_server(faults={fault: 1}).url)
    assert (record.outcome, record.error, record.status) == ("error", kind, status)
    assert record.message
    if fault.startswith("http"):
        assert f"planted {fault}" in record.message
    if fault == "error_event":
        assert record.message == "planted error event"


def test_a_faulty_answer_leaves_the_next_one_alone(mock_server: Callable[..., MockServer]) -> None:
    server = mock_server(faults={"cut": 2, "http_500": 3})
    client = Client(server.url, 10)
    kinds = []
    for _ in range(6):
        record = Record(0, 0)
        body = json.dumps({"model": "mock-model", "prompt": "a", "max_tokens": 4, "stream": True}).encode()
        client.stream(PATHS["completions"], body, record, clock.now())
        kinds.append(record.error)
    assert kinds == [None, "stream_cut", "http_5xx", "stream_cut", None, "stream_cut"]


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    record = send(f"http://127.0.0.1:{port}")
    assert record.error == "connection_refused"


def test_a_server_that_hangs_is_a_timeout(mock_server: Callable[..., MockServer]) -> None:
    record = send(mock_server(faults={"hang": 1}).url, timeout=0.4)
    assert record.error == "timeout"
    assert 0.4 - EARLY_S <= record.end_s <= 0.4 + LATE_S


def test_a_slow_stream_is_a_timeout_of_the_whole_request(mock_server: Callable[..., MockServer]) -> None:
    # Every single token is quick; only the whole takes too long.
    record = send(mock_server(itl_ms=50).url, tokens=100, timeout=0.5)
    assert record.error == "timeout"
    assert 3 <= len(record.token_s) <= 11


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", "malformed_sse"),
        (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", "http_other"),
        (b"SSH-2.0-OpenSSH\r\n", "connection_error"),
        (b"", "connection_error"),
        (event_stream("[1]"), "malformed_sse"),
        (event_stream('{"choices": [{"text": ""}]}', "[DONE]"), "empty_response"),
        (event_stream('{"choices": [{"text": "", "finish_reason": "length"}]}', "[DONE]"), "empty_response"),
        (
            event_stream(
                '{"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}', "[DONE]"
            ),
            "empty_response",
        ),
        (event_stream('{"choices": [{"text": "a"}]}'), "stream_cut"),
        (event_stream('{"choices": [{"text": "a"}]}', chunked=True), "stream_cut"),
        (event_stream('{"choices": [{"text": "a"}]}')[:-4], "stream_cut"),
    ],
)
def test_odd_answers_have_their_class(answer: bytes, kind: str) -> None:
    with raw_server(answer) as url:
        assert send(url).error == kind


def test_a_reset_connection_in_the_middle_is_a_cut_stream() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with raw_server(head, b'26\r\ndata: {"choices": [{"text": "a"}]}\n\n\n\n\r\n', reset=True) as url:
        assert send(url).error == "stream_cut"


def test_a_stream_that_ends_with_a_finish_reason_needs_no_done() -> None:
    with raw_server(event_stream('{"choices": [{"text": "a", "finish_reason": "stop"}]}')) as url:
        record = send(url)
    assert (record.outcome, record.finish_reason) == ("ok", "stop")


def test_tokens_without_a_text_are_an_answer() -> None:
    # One token was asked for and the model chose a special one: vLLM counts it, and has no text for it.
    chunks = (
        '{"choices": [{"text": "", "finish_reason": "length"}]}',
        '{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}',
    )
    with raw_server(event_stream(*chunks, "[DONE]")) as url:
        record = send(url)
    assert (record.outcome, record.output_tokens, record.token_s) == ("ok", 1, [])
    assert record.first_token_s is not None
    assert record.first_token_s == record.last_token_s <= record.end_s


def test_reasoning_is_content() -> None:
    chunk = '{"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": "stop"}]}'
    with raw_server(event_stream(chunk, "[DONE]")) as url:
        assert len(send(url, chat=True).token_s) == 1


def test_a_killed_request_is_cancelled(mock_server: Callable[..., MockServer]) -> None:
    client, record = Client(mock_server(faults={"hang": 1}).url, 10), Record(0, 0)
    body = json.dumps({"model": "mock-model", "prompt": "a", "stream": True}).encode()
    greenlet = gevent.spawn(client.stream, PATHS["completions"], body, record, clock.now())
    gevent.sleep(0.1)
    greenlet.kill()
    assert (record.outcome, record.error) == (CANCELLED, None)


def test_a_connection_is_kept_and_used_again(mock_server: Callable[..., MockServer]) -> None:
    server = mock_server()
    client = Client(server.url, 10)
    for _ in range(5):
        body = json.dumps({"model": "mock-model", "prompt": "a", "max_tokens": 3, "stream": True}).encode()
        client.stream(PATHS["completions"], body, Record(0, 0), clock.now())
    assert len(server.requests) == 5
    assert server.accepted == 1


def test_base_urls() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert normalize_base_url(url) == "http://h:1"
    assert normalize_base_url("https://h/api/v1") == "https://h/api"
    for bad in ("h:1", "ftp://h", "http://", "http://h:x", "http://h:99999"):
        with pytest.raises(LoadTestError, match="--base-url"):
            normalize_base_url(bad)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too  long"}}', "too long"),
        (b'{"error": "plain"}', "plain"),
        (b'{"message": "flat", "object": "error"}', "flat"),
        (b"<h1>Bad\ngateway</h1>", "<h1>Bad gateway</h1>"),
        (b"[]", "[]"),
    ],
)
def test_error_messages(body: bytes, message: str) -> None:
    assert error_message(body) == message


def test_retry_after_is_seconds_or_a_date() -> None:
    assert (retry_after("7"), retry_after("-1"), retry_after(""), retry_after("soon")) == (7.0, 0.0, None, None)
    later = formatdate(clock.to_unix(clock.now()) + 30, usegmt=True)
    assert 28 <= (retry_after(later) or 0) <= 31
