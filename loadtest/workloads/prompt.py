"""What is asked in one request or conversation, and what makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Content = str | list[int] | list[dict[str, Any]]
"""Text, token ids or chat messages."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, the first of its conversation where others follow.

    Attributes:
        content: what the user says: text, token ids or chat messages.
        tokens: the length that it was made for; None when unknown.
        max_tokens: output tokens to ask for; None leaves it to the workload.
        answer: the recorded answer, whose length may stand in for ``max_tokens``.
        extra: fields of the request's body that belong to this prompt, such as ``tools``.
        think_s: seconds from the end of the answer before to this turn.
        between: recorded messages from the last prompt to this one, sent in place of the server's own answer: where
            tools were called, their results fit the recorded call only.
        follow_ups: the turns that follow, in order; they have no follow-ups themselves.

    """

    content: Content
    tokens: int | None
    max_tokens: int | None = None
    answer: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    think_s: float = 0.0
    between: list[dict[str, Any]] | None = None
    follow_ups: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Phase:
    """Which part of a run a prompt is for: requests of different phases may not answer each other from the cache."""

    stage: int = 0
    warmup: bool = False


FIRST = Phase()


class PromptSource(Protocol):
    """Makes prompts."""

    def prompt(self, rng: np.random.Generator, index: int, phase: Phase = ...) -> Prompt:
        """Return the prompt of request ``index`` of a phase, random in ``rng`` only."""


class BodyFormat(Protocol):
    """What the workload needs to know of the endpoint (``loadtest.endpoint.apis``).

    Attributes:
        name: as ``--endpoint`` takes it.
        takes_messages: whether chat messages can be sent.
        takes_token_ids: whether token ids can be sent.
        generates: whether it answers with text, so that output lengths and conversations have a meaning.
        limit_field: field of the body that limits the output tokens; empty when it generates nothing.

    """

    name: str
    takes_messages: bool
    takes_token_ids: bool
    generates: bool
    limit_field: str

    def body(self, content: Content) -> dict[str, Any]:
        """Return the fields of the request's body that hold the prompt and ask for a stream."""

    def parts(self, text: str, images: Sequence[str]) -> list[dict[str, Any]]:
        """Return the content of a message of images, given by their URLs, and text; where messages can be sent."""
