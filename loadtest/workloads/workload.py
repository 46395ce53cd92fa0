"""The requests of a load test: bodies, one after the other in a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.workloads.distributions import TokenDistribution
from loadtest.workloads.prompt import BodyFormat, Content, Phase, Prompt, PromptSource


@dataclass(frozen=True)
class Request:
    """One request ready to be sent.

    Attributes:
        body: the JSON of it.
        prompt_tokens: the length that the prompt was made for; None when unknown, as it is after an answer.
        output_tokens: output tokens that it asks for; None where none are generated.
        turn: its number in its conversation, from 0.
        think_s: seconds from the end of the answer before to when it is due.

    """

    body: bytes
    prompt_tokens: int | None
    output_tokens: int | None
    turn: int = 0
    think_s: float = 0.0


@dataclass(frozen=True)
class Workload:
    """What is asked, apart from when.

    Attributes:
        endpoint: the form of the bodies.
        model: name of the served model.
        source: makes the prompts.
        output_lengths: draws the output tokens to ask for.
        ignore_eos: ask for exactly so many (a parameter of vLLM's).
        temperature: sampling temperature; None leaves the server's default.
        extra_body: merged into every body last, so that it can override.
        seed: with the stage and the number of a request it determines the request.
        times: when each request is meant to start, ascending, in seconds from the begin of a stage; None where the
            workload does not say.
        count_tokens: counts the tokens of a text; it may return None, for a text that it cannot count.
        recorded_lengths: whether a recorded answer's tokens are the output tokens to ask for.

    """

    endpoint: BodyFormat
    model: str
    source: PromptSource
    output_lengths: TokenDistribution
    ignore_eos: bool
    temperature: float | None
    extra_body: dict[str, Any]
    seed: int
    times: Sequence[float] | None = None
    count_tokens: Callable[[str], int | None] | None = None
    recorded_lengths: bool = False

    def conversation(self, stage: int, index: int, warmup: bool = False, stream_id: int = 0) -> Conversation:
        """Return conversation ``index`` of a stage; warm-up has numbers, and so prompts, of its own."""
        rng = np.random.default_rng([self.seed, 1, stage, index, int(warmup), stream_id])
        # The first length is drawn before the prompt, so that it does not depend on how the prompt is made.
        first = self.output_lengths.sample(rng)
        prompt = self.source.prompt(rng, index, Phase(stage, warmup))
        drawn = [first, *(self.output_lengths.sample(rng) for _ in prompt.follow_ups)]
        return Conversation(self, (prompt, *prompt.follow_ups), drawn)

    def request(self, stage: int, index: int, warmup: bool = False, stream_id: int = 0) -> Request:
        """Return the first request of a conversation, which mostly is the only one."""
        return self.conversation(stage, index, warmup, stream_id).request()

    def make(self, prompt: Prompt, content: Content, drawn: int, turn: int) -> Request:
        """Return the request that sends ``content``, which is ``prompt`` after all that was said before it."""
        body: dict[str, Any] = {"model": self.model, **self.endpoint.body(content)}
        asked: int | None = None
        if self.endpoint.generates:
            asked = prompt.max_tokens or self._recorded(prompt) or drawn
            body[self.endpoint.limit_field] = asked
            if self.ignore_eos:
                body["ignore_eos"] = True
            if self.temperature is not None:
                body["temperature"] = self.temperature
        body |= {**prompt.extra, **self.extra_body}
        if self.endpoint.generates:
            asked = int(body.get(self.endpoint.limit_field) or asked or 1)
        return Request(json.dumps(body).encode(), None if turn else prompt.tokens, asked, turn, prompt.think_s)

    def _recorded(self, prompt: Prompt) -> int | None:
        if not (self.recorded_lengths and prompt.answer and self.count_tokens):
            return None
        return self.count_tokens(prompt.answer) or None


class Conversation:
    """The turns of one user, each after the answer to the one before: every prompt begins with all that was said.

    Args:
        workload: makes the bodies.
        turns: what the user says, at least one.
        drawn: output tokens for each turn.

    """

    def __init__(self, workload: Workload, turns: Sequence[Prompt], drawn: Sequence[int]) -> None:
        self._workload = workload
        self._turns = turns
        self._drawn = drawn
        self._turn = 0
        self._said: Content = self._own(turns[0].content)

    def request(self) -> Request:
        """Return the request of the present turn."""
        turn = self._turn
        return self._workload.make(self._turns[turn], self._said, self._drawn[turn], turn)

    def proceed(self, answer: str) -> Request | None:
        """Take the server's answer; returns the request of the next turn, or None when there is no more."""
        self._turn += 1
        if self._turn >= len(self._turns):
            return None
        prompt = self._turns[self._turn]
        if isinstance(self._said, str):
            self._said = f"{self._said}{answer}\n{prompt.content}"
        else:
            between = prompt.between or [{"role": "assistant", "content": answer}]
            self._said = [*self._said, *between, *self._own(prompt.content)]
        return self.request()

    def _own(self, content: Content) -> Content:
        """Return what the user says in the form in which a history can grow."""
        if len(self._turns) > 1 and isinstance(content, str) and self._workload.endpoint.takes_messages:
            return [{"role": "user", "content": content}]
        return content
