"""The request bodies of a load test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.workloads.distributions import TokenDistribution
from loadtest.workloads.prompts import PromptSource


@dataclass(frozen=True)
class Request:
    """One request ready to be sent: its body, and the lengths it asks for in tokens."""

    body: bytes
    prompt_tokens: int | None
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    """What is asked, apart from when.

    Attributes:
        chat: whether bodies are for ``/v1/chat/completions``.
        model: name of the served model.
        source: makes the prompts.
        output_lengths: draws ``max_tokens``.
        ignore_eos: ask for exactly ``max_tokens`` (a parameter of vLLM's).
        temperature: sampling temperature; None leaves the server's default.
        extra_body: merged into every body last, so that it can override.
        seed: with the stage and the number of a request it determines the request.
        times: when each request is meant to start, ascending, in seconds from the begin of a stage; None where the
            workload does not say.

    """

    chat: bool
    model: str
    source: PromptSource
    output_lengths: TokenDistribution
    ignore_eos: bool
    temperature: float | None
    extra_body: dict[str, Any]
    seed: int
    times: Sequence[float] | None = None

    def request(self, stage: int, index: int, warmup: bool = False, stream_id: int = 0) -> Request:
        """Return request ``index`` of a stage; warm-up has numbers, and so prompts, of its own."""
        rng = np.random.default_rng([self.seed, 1, stage, index, int(warmup), stream_id])
        max_tokens = self.output_lengths.sample(rng)
        prompt = self.source.prompt(rng, index)
        max_tokens = prompt.max_tokens or max_tokens
        body: dict[str, Any] = {"model": self.model}
        if not self.chat:
            body["prompt"] = prompt.content
        elif isinstance(prompt.content, str):
            body["messages"] = [{"role": "user", "content": prompt.content}]
        else:
            body["messages"] = prompt.content
        body |= {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.temperature is not None:
            body["temperature"] = self.temperature
        body |= self.extra_body
        return Request(json.dumps(body).encode(), prompt.tokens, int(body.get("max_tokens") or max_tokens))
