"""``/v1/completions``: text or token ids in, text out."""

from __future__ import annotations

from typing import Any

from loadtest.endpoint.answer import Answer
from loadtest.endpoint.apis.api import Api, usage_of
from loadtest.workloads.prompt import Content


class Completions(Api):
    """The completions endpoint."""

    name = "completions"
    path = "/v1/completions"
    takes_token_ids = True

    def body(self, content: Content) -> dict[str, Any]:
        """Return the prompt and the stream's options."""
        return {"prompt": content, "stream": True, "stream_options": {"include_usage": True}}

    def take(self, kind: str, data: dict[str, Any], answer: Answer, arrived: float) -> None:
        """Take a chunk; chat chunks have the same frame."""
        choices = data.get("choices")
        if choices:
            choice = choices[0]
            if choice.get("finish_reason") is not None:
                answer.finish(str(choice["finish_reason"]))
            self.piece(choice, answer, arrived)
        usage = data.get("usage")
        if usage:
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            answer.usage(usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)

    def piece(self, choice: dict[str, Any], answer: Answer, arrived: float) -> None:
        """Take what a choice carries."""
        answer.choice(arrived, choice.get("text") or "")

    def prompt_tokens(self, answer: dict[str, Any]) -> int:
        """Return ``usage.prompt_tokens``."""
        return int(usage_of(answer)["prompt_tokens"])
