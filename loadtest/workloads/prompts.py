"""Prompts of wanted lengths, each determined by the seed, the stage and its number alone.

So request 17 of stage 2 is the same whichever user sends it and whenever, and two runs with one seed send the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loadtest.errors import LoadTestError
from loadtest.workloads.distributions import TokenDistribution

# Frequent short English words, which most tokenizers keep whole. Calibration measures what they really cost.
_FREQUENT = """
the of and to in is was for that with his as at by had not are but from or have an they which one you were all
her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many before must through back years where much your way well down should because each
just those people how too little state good very make world still own see men work long get here between both
life being under never day same another know while last might us great old year off come since against go came
right used take three small place hand house night water white light city next young open far side find head
read line turn land war four group large power school number course point family
"""
WORDS = tuple(_FREQUENT.split())


@dataclass(frozen=True)
class Prompt:
    """One prompt: text, token ids or chat messages; ``tokens`` is the length it was made for, None when unknown."""

    content: str | list[int] | list[dict[str, Any]]
    tokens: int | None
    max_tokens: int | None = None


class PromptSource(Protocol):
    """Makes prompts."""

    def prompt(self, rng: np.random.Generator, index: int) -> Prompt:
        """Return the prompt of request ``index``, random in ``rng`` only."""


@dataclass(frozen=True)
class TokenCost:
    """What text costs on the server: ``tokens = overhead + words * per_word``.

    ``words`` are those to build prompts from; ``how`` says how the numbers were found.
    """

    per_word: float
    overhead: float
    words: tuple[str, ...]
    how: str

    def words_for(self, tokens: int) -> int:
        """Return how many words make a prompt of about ``tokens`` tokens, at least one."""
        return max(1, round((tokens - self.overhead) / self.per_word))


# Prompts too short for this many draws to find a new one are few in kind, and shorter than a block of a prefix cache.
_DRAWS = 16


class _Unrepeated:
    """Draws positions until they are not those of another request; the same request may ask again and gets the same.

    Only prompts of a few tokens ever need a second draw. Which of two equal ones is drawn again depends on their order.
    """

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}

    def draw(self, rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
        """Return ``count`` whole numbers in ``[low, high)``."""
        # The state of the generator tells requests apart, since each has a generator of its own.
        owner = int(rng.bit_generator.state["state"]["state"])
        for _ in range(_DRAWS):
            values: list[int] = rng.integers(low, high, size=count).tolist()
            if self._owners.setdefault(hash(tuple(values)), owner) == owner:
                break
        return values


class WordPrompts:
    """Random words; all prompts start with the same ``prefix_tokens`` tokens' worth of them."""

    def __init__(self, lengths: TokenDistribution, prefix_tokens: int, cost: TokenCost, seed: int) -> None:
        self._lengths = lengths
        self._cost = cost
        self._prefix_tokens = prefix_tokens
        rng = np.random.default_rng([seed, 0])
        count = round(prefix_tokens / cost.per_word)
        # The first word has no space before it, so each word may cost something else there. All prompts start with the
        # one that the calibration started with, whose cost is part of the overhead.
        self._unrepeated = _Unrepeated()
        self._start = [cost.words[0], *(cost.words[i] for i in rng.integers(len(cost.words), size=count))]

    def prompt(self, rng: np.random.Generator, index: int) -> Prompt:
        """Return ``prefix_tokens`` shared tokens and then a drawn number of random ones."""
        tokens = self._prefix_tokens + self._lengths.sample(rng)
        count = max(0, self._cost.words_for(tokens) - len(self._start))
        words = self._cost.words
        return Prompt(
            " ".join([*self._start, *(words[i] for i in self._unrepeated.draw(rng, 0, len(words), count))]), tokens
        )


class TokenIdPrompts:
    """Random token ids in ``[low, high)``: exact lengths without a tokenizer, for ``/v1/completions`` only."""

    def __init__(self, lengths: TokenDistribution, prefix_tokens: int, low: int, high: int, seed: int) -> None:
        self._lengths = lengths
        self._low, self._high = low, high
        self._unrepeated = _Unrepeated()
        self._prefix: list[int] = np.random.default_rng([seed, 0]).integers(low, high, size=prefix_tokens).tolist()

    def prompt(self, rng: np.random.Generator, index: int) -> Prompt:
        """Return the shared ids and then a drawn number of random ones."""
        ids = self._unrepeated.draw(rng, self._low, self._high, self._lengths.sample(rng))
        return Prompt([*self._prefix, *ids], len(self._prefix) + len(ids))


class FilePrompts:
    """Prompts from a file, in its order, over and over."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self._prompts = prompts

    def prompt(self, rng: np.random.Generator, index: int) -> Prompt:
        """Return line ``index`` of the file, starting over at its end."""
        return self._prompts[index % len(self._prompts)]


def parse_token_id_range(text: str) -> tuple[int, int]:
    """Read ``HIGH`` or ``LOW:HIGH``.

    Raises:
        LoadTestError: not a non-empty range of token ids.

    """
    low, _, high = text.rpartition(":")
    try:
        bounds = int(low or 0), int(high)
    except ValueError:
        bounds = (0, 0)
    if not 0 <= bounds[0] < bounds[1]:
        raise LoadTestError(f"--prompt-token-ids {text}: expected HIGH or LOW:HIGH with 0 <= LOW < HIGH")
    return bounds


def read_prompts(path: Path, chat: bool) -> list[Prompt]:
    """Read a prompt file: one prompt a line, or JSON Lines if the name ends in ``.jsonl``.

    A JSON line has ``prompt`` (text or token ids; ``text`` works too) or ``messages`` (chat only), and optionally
    ``max_tokens``, which overrides the drawn output length.

    Raises:
        LoadTestError: the file is missing, empty, or a line does not fit.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"--prompts {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise LoadTestError(f"--prompts {path}: no prompts in the file")
    if path.suffix != ".jsonl":
        return [Prompt(line.strip(), None) for _, line in lines]
    return [_json_prompt(line, f"--prompts {path}:{number}", chat) for number, line in lines]


def _json_prompt(line: str, where: str, chat: bool) -> Prompt:
    try:
        data = json.loads(line)
    except ValueError:
        raise LoadTestError(f"{where}: not JSON") from None
    if not isinstance(data, dict):
        raise LoadTestError(f"{where}: expected an object with prompt or messages")
    max_tokens = data.get("max_tokens")
    if max_tokens is not None and not (isinstance(max_tokens, int) and max_tokens >= 1):
        raise LoadTestError(f"{where}: max_tokens must be a whole number, at least 1")
    messages = data.get("messages")
    if messages is not None:
        if not chat:
            raise LoadTestError(f"{where}: messages need --endpoint chat")
        if not (isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)):
            raise LoadTestError(f"{where}: messages must be a list of objects")
        return Prompt(messages, None, max_tokens)
    prompt = data.get("prompt", data.get("text"))
    if isinstance(prompt, str) and prompt:
        return Prompt(prompt, None, max_tokens)
    if isinstance(prompt, list) and prompt and all(isinstance(each, int) for each in prompt):
        if chat:
            raise LoadTestError(f"{where}: token ids need --endpoint completions")
        return Prompt(prompt, len(prompt), max_tokens)
    raise LoadTestError(f"{where}: expected prompt (text or token ids) or messages")
