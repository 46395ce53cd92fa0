"""Prompts from the rows of a data set: texts, token ids, chat messages, and conversations in ShareGPT's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.errors import LoadTestError
from loadtest.workloads.distributions import TokenDistribution
from loadtest.workloads.images import inline_images
from loadtest.workloads.prompt import FIRST, BodyFormat, Phase, Prompt
from loadtest.workloads.prompts import draw_think
from loadtest.workloads.tables import Row, hub_rows, iter_rows, whole_number
from loadtest.workloads.turns import share_gpt_turns, split_turns

HUB = "hf:"
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("prompt", "text")
_PASSED_ON = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
_TRACE_COLUMNS = ("hash_ids", "resourceSpans", "intended_unix_s")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None takes the first of the usual names that a row has.

    Attributes:
        prompt: text, token ids, messages, or a conversation.
        max_tokens: output tokens to ask for.

    """

    prompt: str | None = None
    max_tokens: str | None = None


class DatasetPrompts:
    """The prompts of a data set in its order, over and over.

    Args:
        prompts: at least one.
        turns: draws the most turns that a conversation may have; None sends what the data set has as one request.
        think_ms: draws the milliseconds from an answer to the next turn; None is no pause.

    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        turns: TokenDistribution | None = None,
        think_ms: TokenDistribution | None = None,
    ) -> None:
        self._prompts = prompts
        self._turns = turns
        self._think_ms = think_ms

    def prompt(self, rng: np.random.Generator, index: int, phase: Phase = FIRST) -> Prompt:
        """Return row ``index`` of the data set, starting over at its end."""
        prompt = self._prompts[index % len(self._prompts)]
        most = self._turns.sample(rng) if self._turns else 1
        if not prompt.follow_ups:
            return prompt
        kept = prompt.follow_ups[: most - 1]
        return replace(
            prompt, follow_ups=tuple(replace(each, think_s=draw_think(self._think_ms, rng)) for each in kept)
        )


def load_prompts(
    source: str,
    endpoint: BodyFormat,
    columns: Columns = Columns(),
    *,
    subset: str | None = None,
    split: str = "train",
    turns: bool = False,
) -> list[Prompt]:
    """Read a data set.

    Args:
        source: a file (:func:`loadtest.workloads.tables.iter_rows`), or ``hf:NAME`` for one that ``datasets`` loads.
        endpoint: what it will be sent to.
        columns: where in a row to look.
        subset: of ``hf:NAME``.
        split: of ``hf:NAME``.
        turns: whether messages are split into turns that the server answers one by one.

    Raises:
        LoadTestError: the data set is missing, empty or not understood, or a row does not fit; the message names it.

    """
    if source.startswith(HUB):
        rows, folder = hub_rows(source.removeprefix(HUB), subset, split), Path()
    else:
        rows, folder = list(iter_rows(Path(source), "--prompts")), Path(source).parent
    if not rows:
        raise LoadTestError(f"--prompts {source}: no rows in the data set")
    return [_prompt(row, endpoint, columns, turns, folder) for row in rows]


def _prompt(row: Row, endpoint: BodyFormat, columns: Columns, turns: bool, folder: Path) -> Prompt:
    where, data = row
    if isinstance(data, str):
        if not data.strip():
            raise LoadTestError(f"{where}: the prompt is empty")
        return Prompt(data, None)
    if not isinstance(data, dict):
        raise LoadTestError(f"{where}: expected an object with prompt or messages")
    column = _column(data, columns.prompt, where)
    limit = columns.max_tokens or "max_tokens"
    if columns.max_tokens and limit not in data:
        raise LoadTestError(f"{where}: no column {limit!r}; it has: {', '.join(map(str, data))}")
    prompt = _content(data[column], column, where, endpoint, turns, folder)
    extra = {name: data[name] for name in _PASSED_ON if data.get(name) not in (None, "")}
    own = data.get("extra_body") or {}
    if not isinstance(own, dict):
        raise LoadTestError(f"{where}: extra_body must be an object")
    extra |= own
    max_tokens = whole_number(data.get(limit), where, limit)
    follow_ups = tuple(replace(each, extra=extra, max_tokens=max_tokens) for each in prompt.follow_ups)
    return replace(prompt, max_tokens=max_tokens, extra=extra, follow_ups=follow_ups)


def _column(data: dict[str, Any], wanted: str | None, where: str) -> str:
    if wanted:
        if wanted in data:
            return wanted
        raise LoadTestError(f"{where}: no column {wanted!r}; it has: {', '.join(map(str, data))}")
    for name in (*MESSAGE_COLUMNS, *TEXT_COLUMNS):
        if data.get(name) is not None:
            return name
    if any(name in data for name in _TRACE_COLUMNS):
        raise LoadTestError(f"{where}: this is a trace; give it with --trace")
    raise LoadTestError(
        f"{where}: expected prompt (text or token ids) or messages, or a column named by --prompt-column; "
        f"it has: {', '.join(map(str, data)) or 'none'}"
    )


def _content(value: Any, column: str, where: str, endpoint: BodyFormat, turns: bool, folder: Path) -> Prompt:
    if isinstance(value, str) and column in MESSAGE_COLUMNS:
        # A table of texts holds lists as JSON.
        try:
            value = json.loads(value)
        except ValueError:
            raise LoadTestError(f"{where}: {column} must be a list of objects") from None
    if isinstance(value, str):
        if not value.strip():
            raise LoadTestError(f"{where}: the prompt is empty; expected prompt with a text")
        return Prompt(value, None)
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return _messages(value, column, where, endpoint, turns, folder)
    if column in MESSAGE_COLUMNS:
        raise LoadTestError(f"{where}: {column} must be a list of objects")
    # A bool is an int to Python; no tokenizer has an id true.
    if isinstance(value, list) and value and all(type(each) is int and each >= 0 for each in value):
        if not endpoint.takes_token_ids:
            raise LoadTestError(f"{where}: token ids need --endpoint completions")
        return Prompt(value, len(value))
    raise LoadTestError(f"{where}: expected prompt (text or token ids) or messages, not {str(value)[:60]!r}")


def _messages(
    value: list[dict[str, Any]], column: str, where: str, endpoint: BodyFormat, turns: bool, folder: Path
) -> Prompt:
    if all("from" in each and "value" in each for each in value):
        return share_gpt_turns(value, where, endpoint.takes_messages)
    if not endpoint.takes_messages:
        raise LoadTestError(f"{where}: messages need --endpoint chat")
    if not all(isinstance(each.get("role"), str) or "type" in each for each in value):
        raise LoadTestError(f"{where}: every object of {column} needs a role")
    # A column type of Parquet gives every message all fields that any of them has.
    messages = [{key: part for key, part in each.items() if part is not None or key == "content"} for each in value]
    messages = inline_images(messages, folder, where)
    return split_turns(messages, where) if turns else Prompt(messages, None)
