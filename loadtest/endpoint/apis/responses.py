"""``/v1/responses``: text or messages in, typed events out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadtest.endpoint.answer import Answer
from loadtest.endpoint.apis.api import Api, usage_of
from loadtest.workloads.prompt import Content

_ASIDE = frozenset({"response.reasoning_text.delta", "response.reasoning_summary_text.delta", "response.refusal.delta"})
_OPAQUE = frozenset(
    {
        "response.function_call_arguments.delta",
        "response.mcp_call_arguments.delta",
        "response.custom_tool_call_input.delta",
        "response.code_interpreter_call_code.delta",
    }
)


class Responses(Api):
    """The responses endpoint."""

    name = "responses"
    path = "/v1/responses"
    takes_messages = True
    # vLLM renders the template for it in another way than for a chat, which /tokenize follows.
    tokenize_knows_prompt = False
    limit_field = "max_output_tokens"

    def body(self, content: Content) -> dict[str, Any]:
        """Return the input; nothing is stored, because every request brings all that was said before."""
        return {"input": content, "stream": True, "store": False}

    def parts(self, text: str, images: Sequence[str]) -> list[dict[str, Any]]:
        """Return images and text in the form of responses."""
        return [*({"type": "input_image", "image_url": url} for url in images), {"type": "input_text", "text": text}]

    def take(self, kind: str, data: dict[str, Any], answer: Answer, arrived: float) -> None:
        """Take an event."""
        kind = data.get("type") or kind
        if kind == "response.output_text.delta":
            answer.choice(arrived, data.get("delta") or "")
        elif kind in _ASIDE:
            answer.choice(arrived, aside=data.get("delta") or "")
        elif kind in _OPAQUE:
            answer.choice(arrived, opaque=bool(data.get("delta")))
        elif kind in ("response.completed", "response.incomplete"):
            response = data.get("response") or {}
            usage = usage_of(response)
            cached = (usage.get("input_tokens_details") or {}).get("cached_tokens")
            answer.usage(usage.get("input_tokens"), usage.get("output_tokens"), cached)
            reason = (response.get("incomplete_details") or {}).get("reason")
            answer.finish({"max_output_tokens": "length", None: "stop"}.get(reason, str(reason)))
            answer.end(arrived)
        elif kind == "response.failed":
            error = (data.get("response") or {}).get("error") or {}
            answer.fail(str(error.get("message") or "response.failed"))
        elif kind == "error":
            answer.fail(str(data.get("message") or "error"))

    def prompt_tokens(self, answer: dict[str, Any]) -> int:
        """Return ``usage.input_tokens``."""
        return int(usage_of(answer)["input_tokens"])
