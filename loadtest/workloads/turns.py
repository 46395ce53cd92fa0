"""Recorded conversations as turns: what the user said each time, for the server under test to answer anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.workloads.prompt import Prompt

# Who speaks, in the data sets that are called ShareGPT.
_USERS = ("human", "user")
_MODELS = ("gpt", "assistant", "chatgpt", "bing", "bard", "model")
_SYSTEMS = ("system",)


def share_gpt_turns(entries: list[dict[str, Any]], where: str, as_messages: bool) -> Prompt:
    """Return the conversation of a ShareGPT row: ``[{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]``.

    Args:
        entries: what was said, in order.
        where: the row, for errors.
        as_messages: whether a system prompt is a message of its own; else it is in front of the first text.

    Raises:
        LoadTestError: nobody asks anything, or an entry is no text.

    """
    system: list[str] = []
    turns: list[Prompt] = []
    for entry in entries:
        role, text = str(entry["from"]).lower(), entry["value"]
        if not isinstance(text, str):
            raise LoadTestError(f"{where}: a value of the conversation is no text")
        if role in _SYSTEMS and not turns:
            system.append(text)
        elif role in _USERS and text.strip():
            turns.append(Prompt(text, None))
        elif role in _MODELS and turns:
            turns[-1] = replace(turns[-1], answer=text)
        # An answer before the first question, and other roles (tools), have no place in what a user says.
    if not turns:
        raise LoadTestError(f"{where}: the conversation holds nothing from {' or '.join(_USERS)}")
    if system and as_messages:
        content: Any = [{"role": "system", "content": "\n".join(system)}, {"role": "user", "content": turns[0].content}]
        turns[0] = replace(turns[0], content=content)
    elif system:
        turns[0] = replace(turns[0], content="\n\n".join([*system, str(turns[0].content)]))
    return replace(turns[0], follow_ups=tuple(turns[1:]))


def split_turns(messages: list[dict[str, Any]], where: str) -> Prompt:
    """Return chat messages as turns: each ends before a message of the assistant, which the server is to write.

    Where the recorded answer called tools, the recorded messages are kept in front of the next turn, because the
    results fit no other call. An answer after the last turn is dropped.

    Raises:
        LoadTestError: the first message is the assistant's own.

    """
    asked: list[list[dict[str, Any]]] = [[]]
    replies: list[list[dict[str, Any]]] = []
    for message in messages:
        answering = len(replies) == len(asked)
        if message.get("role") == "assistant" and not answering:
            replies.append([message])
        elif answering and message.get("role") in ("assistant", "tool", "function"):
            replies[-1].append(message)
        elif answering:
            asked.append([message])
        else:
            asked[-1].append(message)
    if not asked[0]:
        raise LoadTestError(f"{where}: the messages begin with an answer")
    turns = [
        Prompt(content, None, answer=_text(replies, i), between=_kept(replies, i)) for i, content in enumerate(asked)
    ]
    return replace(turns[0], follow_ups=tuple(turns[1:]))


def _text(replies: list[list[dict[str, Any]]], turn: int) -> str | None:
    if turn >= len(replies) or len(replies[turn]) != 1:
        return None
    content = replies[turn][0].get("content")
    return content if isinstance(content, str) else None


def _kept(replies: list[list[dict[str, Any]]], turn: int) -> list[dict[str, Any]] | None:
    """Return the recorded messages in front of ``turn`` if the server's own answer cannot stand in for them."""
    if turn == 0:
        return None
    before = replies[turn - 1]
    return before if len(before) > 1 or before[0].get("tool_calls") else None
