"""What the mock server does, and what it says a text costs.

A token is a word, and a word of more than 8 letters is two; a completions prompt costs 1 token more and a chat 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FAULTS = (
    *("http_400", "http_404", "http_429", "http_500", "http_503"),
    *("reset", "hang", "cut", "malformed", "error_event", "empty"),
)
LONG_WORD = 8


@dataclass
class MockConfig:
    """What the server does.

    Attributes:
        ttft_ms: delay from the end of the request to its first token.
        itl_ms: delay between tokens, counted from the first, so that delays do not add up to a drift.
        tokens_per_chunk: tokens sent together.
        capacity: requests served at once; later ones wait in a queue, first come first served. 0 is no limit.
        faults: fault -> every how many streamed requests it strikes; one that is due strikes instead of the answer.
            ``empty`` is an answer whose first token ended it: a proper stream without any text.
        stall_at_s: seconds after the first streamed request at which the whole server freezes. Negative: never.
        stall_s: for how long.
        models: names of the served models.
        tokenize: whether ``/tokenize`` exists, as in vLLM.
        usage: whether answers carry the usage field.
        owner: ``owned_by`` of the models; vLLM says ``vllm``.

    """

    ttft_ms: float = 0.0
    itl_ms: float = 0.0
    tokens_per_chunk: int = 1
    capacity: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    stall_at_s: float = -1.0
    stall_s: float = 0.0
    models: tuple[str, ...] = ("mock-model",)
    tokenize: bool = True
    usage: bool = True
    owner: str = "vllm"


def count_tokens(text: str) -> int:
    """Return what ``text`` costs."""
    return sum(1 + (len(word) > LONG_WORD) for word in text.split())
