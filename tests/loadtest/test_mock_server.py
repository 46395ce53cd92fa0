"""The mock server's log of when each token left, and the server by hand."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from loadtest import clock
from loadtest.endpoint.client import Client
from loadtest.mock_server import MockServer, read_token_log
from loadtest.results.records import Record

Factory = Callable[..., MockServer]
COMMAND = [sys.executable, "-m", "loadtest.mock_server", "--port", "0"]


def ask(url: str, tokens: int = 5) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    body = {"model": "mock-model", "prompt": "a", "max_tokens": tokens, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    assert connection.getresponse().read().endswith(b"[DONE]\n\n")
    connection.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_log_says_when_each_token_left(mock_server: Factory) -> None:
    server = mock_server(ttft_ms=60, itl_ms=10, tokens_per_chunk=2)
    ask(server.url, tokens=5)
    (served,) = server.log.served
    # The client may have read the end before the server notes it.
    wait_for(lambda: served.ended_unix_s is not None)
    assert (served.number, served.tokens) == (0, [2, 2, 1])
    assert served.started_unix_s is not None
    assert served.ended_unix_s is not None
    assert served.ttft_s is not None
    # The first chunk holds two tokens, so it leaves with the second. Timers never fire early.
    assert served.ttft_s >= 0.069
    assert all(after - before >= 0.005 for before, after in pairwise(served.token_unix_s))
    assert served.received_unix_s <= served.started_unix_s <= served.token_unix_s[0] <= served.ended_unix_s


def test_the_client_never_sees_a_token_before_it_left(mock_server: Factory) -> None:
    server, record = mock_server(ttft_ms=30, itl_ms=5), Record(0, 0)
    client = Client(server.url, 10)
    intended = clock.now()
    record.intended_unix_s = clock.to_unix(intended)
    body = json.dumps({"model": "mock-model", "prompt": "a", "max_tokens": 8, "stream": True}).encode()
    client.stream("/v1/completions", body, record, intended)
    left = server.log.served[0].token_unix_s
    arrived = [record.intended_unix_s + seconds for seconds in record.token_s]
    assert len(left) == len(arrived) == 8
    assert all(came >= went for went, came in zip(left, arrived, strict=True))


def test_a_refused_request_is_in_the_log_and_has_no_token(mock_server: Factory) -> None:
    server = mock_server(faults={"http_500": 1})
    with pytest.raises(AssertionError):
        ask(server.url)
    (served,) = server.log.served
    assert (served.started_unix_s, served.token_unix_s) == (None, [])


def test_the_server_by_hand_writes_its_log(tmp_path: Path) -> None:
    log = tmp_path / "tokens.jsonl"
    process = subprocess.Popen([*COMMAND, "--ttft-ms", "1", "--log", str(log)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        ask(url, tokens=3)
        wait_for(lambda: log.read_text().endswith("\n"))
        # What has ended is in the file whatever becomes of the server.
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        (served,) = read_token_log(log)
        assert len(served.token_unix_s) == 3
    finally:
        process.kill()
        process.communicate()
    with log.open("a") as file:
        file.write('{"number":1,')
    assert len(list(read_token_log(log))) == 1


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--log", str(tmp_path)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"mock_server: --log {tmp_path}: Is a directory"]
