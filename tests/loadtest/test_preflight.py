from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from loadtest.endpoint.apis.registry import APIS
from loadtest.endpoint.calibration import calibrate
from loadtest.endpoint.client import Client
from loadtest.errors import LoadTestError
from loadtest.load.preflight import check_server
from loadtest.mock_server import MockConfig, MockServer
from loadtest.workloads.distributions import parse_distribution
from loadtest.workloads.prefixes import PrefixPool
from loadtest.workloads.prompts import WordPrompts

Factory = Callable[..., MockServer]


def test_a_server_is_found_with_its_models_and_version(mock_server: Factory) -> None:
    server = check_server(Client(mock_server(models=("a", "b")).url, 10), None, 0)
    assert (server.model, server.served_models, server.version) == ("a", ["a", "b"], "0.0-mock")
    assert server.is_vllm
    assert server.cache_config["cache_dtype"] == "auto"


def test_another_servers_owner_is_not_vllm(mock_server: Factory) -> None:
    assert not check_server(Client(mock_server(owner="somebody").url, 10), None, 0).is_vllm


def test_a_model_that_is_not_served_is_refused_with_those_that_are(mock_server: Factory) -> None:
    client = Client(mock_server(models=("a", "b")).url, 10)
    assert check_server(client, "b", 0).model == "b"
    with pytest.raises(LoadTestError, match="does not serve 'c'; it serves: a, b"):
        check_server(client, "c", 0)


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LoadTestError, match=f"nothing listens at http://127.0.0.1:{port}"):
        check_server(Client(f"http://127.0.0.1:{port}", 10), None, 0)


def test_waiting_for_a_server_that_is_still_starting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = MockServer(MockConfig(), port=port)

    def start() -> None:
        time.sleep(0.5)
        server.__enter__()

    thread = threading.Thread(target=start)
    thread.start()
    try:
        assert check_server(Client(server.url, 10), None, 20).model == "mock-model"
    finally:
        thread.join()
        server.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "not an OpenAI-compatible server.*HTTP 404: no"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "not an OpenAI-compatible server"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":[]}', "serves no model"),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "--api-key"),
        (b"220 smtp ready\r\n", "not an OpenAI-compatible server"),
        (b"", "cannot reach"),
    ],
)
def test_what_is_no_openai_server_is_said_to_be_none(answer: bytes, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.recv(4096)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(LoadTestError, match=why):
            check_server(Client(f"http://127.0.0.1:{listener.getsockname()[1]}", 5), None, 0)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("tokenize", [False, True])
def test_calibrated_prompts_cost_what_was_asked_for(mock_server: Factory, chat: bool, tokenize: bool) -> None:
    server = mock_server(tokenize=tokenize)
    client = Client(server.url, 10)
    cost = calibrate(client, "mock-model", APIS["chat" if chat else "completions"])
    assert ("/tokenize" in cost.how) == tokenize
    assert cost.overhead == (5 if chat else 1)
    prompt = WordPrompts(parse_distribution("321", "-"), PrefixPool((40,)), cost, 0).prompt(np.random.default_rng(0), 0)
    body = {"messages": [{"role": "user", "content": prompt.content}]} if chat else {"prompt": prompt.content}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    answer = client.call(path, {"model": "mock-model", "max_tokens": 1, **body})
    assert answer["usage"]["prompt_tokens"] == prompt.tokens == 361


def test_calibration_sends_no_generation_where_tokenize_exists(mock_server: Factory) -> None:
    server = mock_server()
    calibrate(Client(server.url, 10), "mock-model", APIS["completions"])
    assert server.requests == []


def test_calibration_without_usage_says_what_to_do(mock_server: Factory) -> None:
    with pytest.raises(LoadTestError, match="--prompt-token-ids"):
        calibrate(Client(mock_server(tokenize=False, usage=False).url, 10), "mock-model", APIS["completions"])


def test_calibration_passes_on_why_the_server_refuses(mock_server: Factory) -> None:
    with pytest.raises(LoadTestError, match="refused a test request: HTTP 404: The model `other`"):
        calibrate(Client(mock_server(tokenize=False).url, 10), "other", APIS["completions"])


def test_the_mock_says_the_truth_about_tokens(mock_server: Factory) -> None:
    client = Client(mock_server().url, 10)
    answer = client.call("/tokenize", {"prompt": "short extraordinary", "return_token_strs": True})
    assert (answer["count"], answer["token_strs"]) == (4, ["<s>", "Ġshort", "Ġextraord", "inary"])


def test_https_against_a_server_without_tls_says_so(mock_server: Factory) -> None:
    url = mock_server().url.replace("http:", "https:")
    with pytest.raises(LoadTestError, match="does it speak TLS"):
        check_server(Client(url, 5.0), None, 0.0)


def test_a_senseless_usage_is_not_called_missing(mock_server: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(mock_server(tokenize=False).url, 5.0)
    monkeypatch.setattr(client, "call", lambda path, *_, **__: {"usage": {"prompt_tokens": 7}} if "v1" in path else {})
    with pytest.raises(LoadTestError, match=r"is no length of a prompt: 7 for 16 words and 7 for 144"):
        calibrate(client, "mock-model", APIS["completions"])
