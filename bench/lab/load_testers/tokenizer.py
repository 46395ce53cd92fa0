"""A tokenizer on disk in which each word of the mock server's answers is one token, as the mock counts them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from quant_methods.model_source import resolve_model

WORDS = ("lorem", "ipsum", "dolor", "größe", "日本", "amet", "sit", "elit")
"""What the mock server says, over and over."""


def write_tokenizer(out: Path) -> None:
    """Write the tokenizer of the embedded model, with the mock's words as tokens of their own.

    Without them a tool that counts the tokens of an answer by itself, because the server does not, would be right and
    seem to be wrong.
    """
    source = resolve_model("ref-7m")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens([f" {word}" for word in WORDS])
    out.mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    # The class has this name in every release of transformers that the tools bring along.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(config))
