"""``/v1/embeddings``: text or token ids in, vectors out; nothing is generated, so only the end of the answer counts."""

from __future__ import annotations

from typing import Any

from loadtest.endpoint.answer import Answer
from loadtest.endpoint.apis.api import Api, usage_of
from loadtest.workloads.prompt import Content


class Embeddings(Api):
    """The embeddings endpoint."""

    name = "embeddings"
    path = "/v1/embeddings"
    takes_token_ids = True
    generates = False
    limit_field = ""

    def body(self, content: Content) -> dict[str, Any]:
        """Return the input."""
        return {"input": content}

    def take(self, kind: str, data: dict[str, Any], answer: Answer, arrived: float) -> None:
        """Take the whole answer."""
        vectors = data.get("data")
        if not (isinstance(vectors, list) and vectors and all("embedding" in each for each in vectors)):
            answer.fail("the answer holds no embedding", empty=True)
            return
        answer.usage(usage_of(data).get("prompt_tokens"), 0, None)
        answer.end(arrived)

    def prompt_tokens(self, answer: dict[str, Any]) -> int:
        """Return ``usage.prompt_tokens``."""
        return int(usage_of(answer)["prompt_tokens"])
