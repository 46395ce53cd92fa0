"""``/v1/chat/completions``: messages in, which may hold images and calls of tools; a message out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadtest.endpoint.answer import Answer
from loadtest.endpoint.apis.completions import Completions
from loadtest.workloads.prompt import Content


class Chat(Completions):
    """The chat endpoint; its chunks have the frame of completions."""

    name = "chat"
    path = "/v1/chat/completions"
    takes_messages = True
    takes_token_ids = False

    def body(self, content: Content) -> dict[str, Any]:
        """Return the messages, as they are where they are given, and the stream's options."""
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}

    def parts(self, text: str, images: Sequence[str]) -> list[dict[str, Any]]:
        """Return images and text in the form of chats."""
        return [*({"type": "image_url", "image_url": {"url": url}} for url in images), {"type": "text", "text": text}]

    def piece(self, choice: dict[str, Any], answer: Answer, arrived: float) -> None:
        """Take a delta: text, visible reasoning, or a part of the call of a tool."""
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        answer.choice(arrived, delta.get("content") or "", reasoning, bool(delta.get("tool_calls")))
