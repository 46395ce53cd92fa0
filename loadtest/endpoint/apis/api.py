"""What is common to all APIs: how a request is written, and what an answer says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from loadtest.endpoint.answer import Answer
from loadtest.workloads.prompt import Content


class Api(ABC):
    """One kind of request.

    Attributes:
        name: as ``--endpoint`` takes it.
        path: where it is served.
        takes_messages: whether chat messages can be sent.
        takes_token_ids: whether token ids can be sent.
        generates: whether it answers with text. Where it does not, the answer is one JSON object and no stream.
        tokenize_knows_prompt: whether vLLM's ``/tokenize`` counts the very prompt that this API makes of a text.
        limit_field: field of the body that limits the output tokens; empty when it generates nothing.

    """

    name: str
    path: str
    takes_messages = False
    takes_token_ids = False
    generates = True
    tokenize_knows_prompt = True
    limit_field = "max_tokens"

    @abstractmethod
    def body(self, content: Content) -> dict[str, Any]:
        """Return the fields of the request's body that hold the prompt, and ask for a stream with usage."""

    def parts(self, text: str, images: Sequence[str]) -> list[dict[str, Any]]:
        """Return the content of a message of images, given by their URLs, and text; where messages can be sent."""
        raise NotImplementedError

    @abstractmethod
    def take(self, kind: str, data: dict[str, Any], answer: Answer, arrived: float) -> None:
        """Note in ``answer`` what a piece of the stream says, or the whole answer where there is no stream.

        Args:
            kind: type of the server-sent event.
            data: its JSON.
            answer: the answer so far.
            arrived: when it came, in seconds after the intended start.

        """

    @abstractmethod
    def prompt_tokens(self, answer: dict[str, Any]) -> int:
        """Return the length of the prompt from an answer without a stream.

        Raises:
            KeyError, TypeError, ValueError: it does not say.

        """


def usage_of(data: dict[str, Any]) -> dict[str, Any]:
    """Return the usage field of an answer, empty where there is none."""
    usage = data.get("usage")
    return usage if isinstance(usage, dict) else {}
