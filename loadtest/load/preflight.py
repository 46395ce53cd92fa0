"""What is checked and learnt before the first request: the server, its model, and what text costs in tokens."""

from __future__ import annotations

import re
import time
from typing import Any

import gevent

from loadtest.endpoint.client import PATHS, Client, HTTPStatusError
from loadtest.errors import LoadTestError
from loadtest.results.schema import Server
from loadtest.watching.server_metrics import cache_config
from loadtest.workloads.prompts import WORDS, TokenCost

_SHORT, _LONG = 16, 144


def check_server(client: Client, model: str | None, ready_timeout: float) -> Server:
    """Ask the endpoint what it serves.

    Args:
        client: of the endpoint.
        model: the wanted model, or None for the first one served.
        ready_timeout: seconds to wait for a server that does not answer yet.

    Raises:
        LoadTestError: nothing listens, it is no OpenAI-compatible server, or it does not serve ``model``.

    """
    deadline = time.monotonic() + ready_timeout
    while True:
        try:
            return _look(client, model)
        except (OSError, HTTPStatusError) as error:
            # 502 to 504 is a gateway whose server is still starting.
            waiting = not isinstance(error, HTTPStatusError) or error.status in (502, 503, 504)
            if not waiting or time.monotonic() >= deadline:
                raise LoadTestError(_explain(client, error)) from error
            gevent.sleep(min(1.0, max(0.05, deadline - time.monotonic())))


def _explain(client: Client, error: Exception) -> str:
    url = client.base_url
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {url}; is the server started? (--ready-timeout S waits for it)"
    if isinstance(error, HTTPStatusError) and error.status in (401, 403):
        return f"{url} refuses access ({error}); give --api-key or set OPENAI_API_KEY"
    if isinstance(error, HTTPStatusError):
        return f"{url} is not an OpenAI-compatible server: GET /v1/models answered {error}"
    return f"cannot reach {url}: {error}{_tls_hint(client)}"


def _tls_hint(client: Client) -> str:
    if client.base_url.startswith("https:"):
        return "; does it speak TLS? without TLS its address starts with http://"
    return "; if it speaks TLS, its address starts with https://"


def _look(client: Client, model: str | None) -> Server:
    try:
        answer = client.call("/v1/models")
        entries = [entry for entry in answer["data"] if isinstance(entry["id"], str)]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadTestError(
            f"{client.base_url} is not an OpenAI-compatible server: GET /v1/models gave no list of models"
            + (f" ({error}{_tls_hint(client)})" if str(error).startswith("not HTTP") else "")
        ) from error
    served = [entry["id"] for entry in entries]
    if not served:
        raise LoadTestError(f"{client.base_url} serves no model")
    if model is not None and model not in served:
        raise LoadTestError(f"{client.base_url} does not serve {model!r}; it serves: {', '.join(served)}")
    is_vllm = any(entry.get("owned_by") == "vllm" for entry in entries)
    return Server(client.base_url, model or served[0], served, _version(client), is_vllm, _cache_config(client))


def _version(client: Client) -> str | None:
    try:
        return str(client.call("/version")["version"])
    except (OSError, HTTPStatusError, ValueError, KeyError):
        return None


def _cache_config(client: Client) -> dict[str, str]:
    try:
        return cache_config(client.get("/metrics", 10.0).decode("utf-8", "replace"))
    except (OSError, HTTPStatusError, ValueError):
        return {}


def calibrate(client: Client, model: str, chat: bool) -> TokenCost:
    """Find out how many tokens the words of a prompt cost on this server.

    vLLM's ``/tokenize`` answers without generating, and tells which words are a single token, so that lengths come out
    exact. Any other server is sent two one-token requests of different lengths, whose usage gives slope and overhead.

    Raises:
        LoadTestError: the server refuses the test request, or reports no usage.

    """
    return _by_tokenize(client, model, chat) or _by_usage(client, model, chat)


def _by_tokenize(client: Client, model: str, chat: bool) -> TokenCost | None:
    def count(words: tuple[str, ...]) -> int:
        return int(client.call("/tokenize", {"model": model, **_body(words, chat)})["count"])

    try:
        strings = client.call("/tokenize", {"model": model, "prompt": " ".join(WORDS), "return_token_strs": True})
        whole = _single_token_words(strings.get("token_strs") or [])
        # The first word of a prompt has no space before it, so it may cost more: part of the overhead.
        short, long = (_repeated(whole, n) for n in (_SHORT, _LONG)) if len(whole) >= _SHORT else ((), ())
        if whole and short and count(long) - count(short) == _LONG - _SHORT:
            return TokenCost(1.0, count(short) - _SHORT, whole, "/tokenize, words of one token")
        short, long = _repeated(WORDS, _SHORT), _repeated(WORDS, _LONG)
        return _line(count(short), count(long), "/tokenize")
    except (OSError, HTTPStatusError, ValueError, KeyError, TypeError):
        return None


def _single_token_words(token_strings: list[Any]) -> tuple[str, ...]:
    # Byte-level tokenizers write the space before a word as U+0120, SentencePiece as U+2581.
    pieces = {str(piece)[1:] for piece in token_strings if re.match("[ \u0120\u2581]", str(piece))}
    return tuple(word for word in WORDS if word in pieces)


def _by_usage(client: Client, model: str, chat: bool) -> TokenCost:
    def count(words: tuple[str, ...]) -> int:
        body = {"model": model, **_body(words, chat), "max_tokens": 1}
        usage = client.call(PATHS["chat" if chat else "completions"], body, timeout=client.timeout).get("usage") or {}
        return int(usage["prompt_tokens"])

    try:
        short, long = count(_repeated(WORDS, _SHORT)), count(_repeated(WORDS, _LONG))
    except HTTPStatusError as error:
        raise LoadTestError(f"{client.base_url} refused a test request: {error}") from error
    except OSError as error:
        raise LoadTestError(f"a test request to {client.base_url} failed: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LoadTestError(
            f"{client.base_url} reports no usage.prompt_tokens, so that prompts of a wanted length cannot be made; "
            "use --prompts FILE or --prompt-token-ids"
        ) from error
    try:
        return _line(short, long, "usage of two test requests")
    except ValueError as error:
        raise LoadTestError(
            f"usage.prompt_tokens of {client.base_url} is no length of a prompt: {short} for {_SHORT} words and {long} "
            f"for {_LONG}; use --prompts FILE or --prompt-token-ids"
        ) from error


def _line(short: int, long: int, how: str) -> TokenCost:
    per_word = (long - short) / (_LONG - _SHORT)
    if per_word <= 0:
        raise ValueError(f"{_LONG} words cost no more tokens than {_SHORT}")
    return TokenCost(per_word, short - _SHORT * per_word, WORDS, how)


def _repeated(words: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(words[i % len(words)] for i in range(count))


def _body(words: tuple[str, ...], chat: bool) -> dict[str, Any]:
    text = " ".join(words)
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
