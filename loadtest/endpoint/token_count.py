"""Counts the tokens of text that a server did not count: by a local tokenizer, or by the server's own ``/tokenize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadtest.endpoint.client import Client, HTTPStatusError
from loadtest.errors import LoadTestError

_FILE = "tokenizer.json"


def read_tokenizer(path: Path) -> Any:
    """Return the tokenizer in a ``tokenizer.json``, or in a model's folder that has one.

    Raises:
        LoadTestError: there is none.

    """
    from tokenizers import Tokenizer

    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise LoadTestError(f"--tokenizer {path}: no such file; expected a {_FILE}, or a model's folder that has one")
    try:
        json.loads(file.read_bytes())
        return Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises Exception itself.
        raise LoadTestError(f"--tokenizer {path}: not a {_FILE}: {' '.join(str(error).split())[:200]}") from error


class LocalCounter:
    """Counts with a local tokenizer.

    Args:
        tokenizer: from :func:`read_tokenizer`.

    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> int:
        """Return how many tokens ``text`` is, without those that begin or end a sequence."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


class ServerCounter:
    """Counts with the server's ``/tokenize``, which vLLM has; the first refusal is taken for the last word.

    Args:
        client: of the server.
        model: the served model.

    """

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._model = model
        self._overhead: int | None = None
        self._missing = False

    def __call__(self, text: str) -> int | None:
        """Return how many tokens ``text`` is, without those that begin a sequence; None when the server cannot say."""
        if self._missing:
            return None
        try:
            if self._overhead is None:
                # A token that begins every sequence is counted too, whatever the server makes of add_special_tokens.
                self._overhead = 2 * self._ask("the") - self._ask("the the")
            return max(0, self._ask(text) - self._overhead)
        except (OSError, HTTPStatusError, ValueError, KeyError, TypeError):
            self._missing = True
            return None

    def _ask(self, text: str) -> int:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return int(self._client.call("/tokenize", body)["count"])
