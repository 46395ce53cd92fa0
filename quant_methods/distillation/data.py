"""What a student is trained on: windows of text, or chats, of which the assistant's words count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences, load_tokenizer, read_documents
from quant_methods.model_source import read_config


@dataclass(frozen=True)
class Data:
    """Sequences of one length.

    Attributes:
        tokens: int64 [sequences, length]; what is shorter has other tokens behind, which nothing before them sees.
        counted: bool [sequences, length - 1]: whether the token that follows each one is to be learnt.
        held_out: the last so many sequences are never trained on.
        prompts: of chats, the tokens in front of the first answer, for a student that writes its own; text has none.

    """

    tokens: Tensor
    counted: Tensor
    held_out: int
    prompts: tuple[list[int], ...] = ()

    def __len__(self) -> int:
        """Return how many sequences there are to train on."""
        return len(self.tokens) - self.held_out

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return a sequence to train on, or (from ``len`` on) one that is held out."""
        return {
            "sequence": torch.tensor(number),
            "input_ids": self.tokens[number],
            "counted": self.counted[number],
        }


def load(model_dir: Path, text: Path, samples: int, held_out: int, length: int, seed: int = 0) -> Data:
    """Read a file of text or of chats.

    Args:
        model_dir: whose tokenizer and chat template.
        text: ``.txt``, or ``.jsonl`` with a ``text`` or a ``messages`` field; the first line says which of the two.
        samples: sequences to train on: windows of text, or chats, in file order (``load_sequences``).
        held_out: more of them that are not trained on.
        length: tokens in each; longer chats are cut.
        seed: another order of the documents (``load_sequences``).

    Raises:
        ParetoError: a file or a number that is of no use.

    """
    if samples < 1 or held_out < 1 or length < 2:
        raise ParetoError(
            f"--samples {samples}, --held-out {held_out} and --length {length}: at least 1, 1 and 2 are needed"
        )
    context = read_config(model_dir).get("max_position_embeddings")
    if isinstance(context, int) and length > context:
        raise ParetoError(f"--length {length} exceeds the teacher's context of {context}; give {context} or less")
    if isinstance(next(read_documents(text), ""), list):
        return _chats(model_dir, text, samples, held_out, length)
    tokens = load_sequences(model_dir, text, samples + held_out, length, seed)
    return Data(tokens, torch.ones(len(tokens), length - 1, dtype=torch.bool), held_out)


def _chats(model_dir: Path, text: Path, samples: int, held_out: int, length: int) -> Data:
    tokenizer = load_tokenizer(model_dir)
    rows, counted, prompts = [], [], []
    for chat in read_documents(text):
        if not isinstance(chat, list):
            raise ParetoError(f"{text} mixes lines with 'text' and lines with 'messages'; give a file of one kind")
        ids, mine = encode_chat(tokenizer, chat, text)
        # Position i says what follows it, so a token counts one place before its own.
        shown = mine[1:length]
        if not any(shown):
            continue  # The answer lies behind the cut, or there is none.
        padding = length - min(length, len(ids))
        rows.append(ids[:length] + [0] * padding)
        counted.append(shown + [False] * (length - 1 - len(shown)))
        prompts.append(ids[: mine.index(True)])
        if len(rows) == samples + held_out:
            break
    if len(rows) < samples + held_out:
        raise ParetoError(
            f"{text} has {len(rows):,} chats with an answer within {length} tokens; --samples {samples} and --held-out "
            f"{held_out} need {samples + held_out:,}"
        )
    return Data(torch.tensor(rows), torch.tensor(counted), held_out, tuple(prompts))


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]], text: Path) -> tuple[list[int], list[bool]]:
    """Return a chat's tokens, and which of them an assistant's turn has: its words and what ends them.

    A turn's tokens are those by which the chat up to it is longer than the chat before it with the template's opening
    of an answer. So it needs no template that marks them.

    Args:
        tokenizer: with a chat template.
        messages: of the chat.
        text: where it comes from, for errors.

    Raises:
        ParetoError: there is no template, or it refuses the chat or writes a chat otherwise when more follows.

    """
    if not tokenizer.chat_template:
        raise ParetoError(f"{text} holds chats ('messages'), and the teacher has no chat template to write them with")

    def written(upto: int, opened: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=opened))
        except Exception as error:  # A template is a program of the model's, and may raise anything.
            reason = " ".join(str(error).split())[:160]
            raise ParetoError(f"{text}: the chat template refuses {str(messages)[:60]}: {reason}") from error

    whole = written(len(messages), False)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = written(place, True), written(place + 1, False)
            if not whole.startswith(after) or not after.startswith(before):
                raise ParetoError(
                    f"{text}: the chat template writes earlier turns otherwise when more follow, so an answer's tokens "
                    "cannot be told; give chats of one question and one answer"
                )
            spans.append((len(before), len(after)))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mine = [any(start <= at < stop for start, stop in spans) for at, _ in found["offset_mapping"]]
    return list(found["input_ids"]), mine
