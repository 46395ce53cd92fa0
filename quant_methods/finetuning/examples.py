"""What an adapter learns from: each answer of a chat with all that went before it, or plain text."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_tokenizer, read_documents

TEMPLATE = (
    "{text} holds chats ('messages'), and the model has no chat template to write them with; give lines with a 'text' "
    "field, or a model that was made for chats"
)


@dataclass(frozen=True)
class Examples:
    """Examples as trl takes them.

    Attributes:
        training: ``prompt`` and ``completion`` (lists of messages, of which the completion is learnt), or ``text``.
        held_out: the same, never trained on.
        sha256: of all of them, in order.
        source: the file's name.

    """

    training: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    sha256: str
    source: str

    def describe(self) -> dict[str, Any]:
        """Return what a result says of its data."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "training": len(self.training),
            "held_out": len(self.held_out),
        }


def read_examples(model_dir: Path, data: Path, held_out: int, seed: int) -> Examples:
    """Read a file and set some of its documents apart.

    Whole documents are held out, so that no example to train on is the beginning of one that is held out.

    Args:
        model_dir: whose chat template.
        data: ``.jsonl`` with a ``messages`` or a ``text`` field.
        held_out: examples that are not trained on, at least.
        seed: chooses them.

    Raises:
        ParetoError: the file cannot be read, mixes both kinds, has no answers, or has too few.

    """
    if data.suffix == ".txt":
        raise ParetoError(f"{data}: expected a .jsonl file with a 'messages' or a 'text' field in each line")
    documents = list(read_documents(data))
    kinds = {type(document) for document in documents}
    if len(kinds) > 1:
        raise ParetoError(f"{data} mixes lines with 'text' and lines with 'messages'; give a file of one kind")
    if list in kinds and not load_tokenizer(model_dir).chat_template:
        raise ParetoError(TEMPLATE.format(text=data))
    groups = [found for document in documents if (found := _examples(document))]
    if list in kinds and not groups:
        raise ParetoError(
            f"{data} has no message of the role 'assistant' that follows another; answers are what is learnt"
        )
    digest = hashlib.sha256(json.dumps(groups, ensure_ascii=False).encode()).hexdigest()
    random.Random(seed).shuffle(groups)
    apart: list[dict[str, Any]] = []
    while groups and len(apart) < held_out:
        apart += groups.pop()
    training = [example for group in groups for example in group]
    if not training:
        raise ParetoError(
            f"{data} has {len(apart)} examples, and --held-out {held_out} leaves none to train on; give more data or "
            "a smaller --held-out"
        )
    return Examples(training, apart, digest, data.name)


def _examples(document: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the examples of a document: a text, or each answer of a chat with what went before it."""
    if isinstance(document, str):
        return [{"text": document}] if document.strip() else []
    messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in document]
    places = [place for place, one in enumerate(messages) if place and one["role"] == "assistant"]
    return [{"prompt": messages[:place], "completion": [messages[place]]} for place in places]
