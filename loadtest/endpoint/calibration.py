"""What text costs in tokens on the server, learnt before the first request."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from loadtest.endpoint.apis.api import Api
from loadtest.endpoint.client import Client, HTTPStatusError
from loadtest.errors import LoadTestError
from loadtest.workloads.prompts import WORDS, TokenCost

_SHORT, _LONG = 16, 144


def calibrate(client: Client, model: str, api: Api, tokenizer: Any = None) -> TokenCost:
    """Find out how many tokens the words of a prompt cost on this server.

    vLLM's ``/tokenize`` answers without generating, and tells which words are a single token, so that lengths come out
    exact. Any other server is sent two one-token requests of different lengths, whose usage gives slope and overhead.

    Args:
        client: of the server.
        model: the served model.
        api: what is asked.
        tokenizer: the model's (:func:`loadtest.endpoint.token_count.read_tokenizer`), for a server that says nothing of
            tokens; what a chat template adds, it does not know.

    Raises:
        LoadTestError: the server refuses the test request, or reports no usage and there is no tokenizer.

    """
    found = _by_tokenize(client, model, api)
    if found is not None and not api.tokenize_knows_prompt:
        found = _with_own_overhead(client, model, api, found)
    if found is None and tokenizer is not None:
        found = _by_tokenizer(tokenizer)
    return found or _by_usage(client, model, api)


def _by_tokenizer(tokenizer: Any) -> TokenCost:
    def count(words: tuple[str, ...]) -> int:
        return len(tokenizer.encode(" ".join(words)).ids)

    whole = tuple(word for word in WORDS if len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1)
    words = whole if len(whole) >= _SHORT else WORDS
    short, long = count(_repeated(words, _SHORT)), count(_repeated(words, _LONG))
    return _line(short, long, "--tokenizer", words)


def _by_tokenize(client: Client, model: str, api: Api) -> TokenCost | None:
    def count(words: tuple[str, ...]) -> int:
        return int(client.call("/tokenize", {"model": model, **_tokenize_body(words, api)})["count"])

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


def _with_own_overhead(client: Client, model: str, api: Api, cost: TokenCost) -> TokenCost:
    """Return ``cost`` with the overhead that the API itself reports, if it does."""
    try:
        count = _usage(client, model, api, _repeated(cost.words, _SHORT))
    except (OSError, HTTPStatusError, ValueError, KeyError, TypeError):
        return cost
    return replace(cost, overhead=count - _SHORT * cost.per_word, how=f"{cost.how}, and usage of a test request")


def _usage(client: Client, model: str, api: Api, words: tuple[str, ...]) -> int:
    body = {"model": model, **api.body(" ".join(words)), **({api.limit_field: 1} if api.generates else {})}
    for name in ("stream", "stream_options"):
        body.pop(name, None)
    return api.prompt_tokens(client.call(api.path, body, timeout=client.timeout))


def _by_usage(client: Client, model: str, api: Api) -> TokenCost:
    def count(words: tuple[str, ...]) -> int:
        return _usage(client, model, api, words)

    try:
        short, long = count(_repeated(WORDS, _SHORT)), count(_repeated(WORDS, _LONG))
    except HTTPStatusError as error:
        raise LoadTestError(f"{client.base_url} refused a test request: {error}") from error
    except OSError as error:
        raise LoadTestError(f"a test request to {client.base_url} failed: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LoadTestError(
            f"{client.base_url} reports no usage.prompt_tokens, so that prompts of a wanted length cannot be made; "
            "use --tokenizer PATH, --prompts FILE or --prompt-token-ids"
        ) from error
    try:
        return _line(short, long, "usage of two test requests")
    except ValueError as error:
        raise LoadTestError(
            f"usage.prompt_tokens of {client.base_url} is no length of a prompt: {short} for {_SHORT} words and {long} "
            f"for {_LONG}; use --prompts FILE or --prompt-token-ids"
        ) from error


def _line(short: int, long: int, how: str, words: tuple[str, ...] = WORDS) -> TokenCost:
    per_word = (long - short) / (_LONG - _SHORT)
    if per_word <= 0:
        raise ValueError(f"{_LONG} words cost no more tokens than {_SHORT}")
    return TokenCost(per_word, short - _SHORT * per_word, words, how)


def _repeated(words: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(words[i % len(words)] for i in range(count))


def _tokenize_body(words: tuple[str, ...], api: Api) -> dict[str, Any]:
    text = " ".join(words)
    # With messages, /tokenize counts what the chat template adds.
    return {"messages": [{"role": "user", "content": text}]} if api.takes_messages else {"prompt": text}
