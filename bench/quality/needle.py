"""Needle in a haystack: a number planted in filler, asked for at the end.

The idea is Kamradt's (2023); the sentence about a "special magic number" and the answer's beginning given in the prompt
follow RULER (Hsieh et al., 2024, section 3.1), so that a base model without instruction tuning answers by continuing.
The answer is decoded greedily and counts when the first number in it is the planted one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality.schema import Needle, NeedleCell
from bench.statistics import proportion
from kv_cache.errors import ParetoError

NEEDLE = " The special magic number for {key} is: {number}."
QUESTION = "\nQuestion: What is the special magic number for {key}?\nAnswer: The special magic number for {key} is:"
KEYS = (
    "Amsterdam", "Athens", "Berlin", "Bogota", "Boston", "Cairo", "Chicago", "Dallas", "Dublin", "Houston", "Lima",
    "Lisbon", "London", "Madrid", "Nairobi", "Oslo", "Paris", "Prague", "Rome", "Seattle", "Sydney", "Tokyo", "Toronto",
    "Vienna",
)  # fmt: skip
# How far before the wanted depth a sentence may end for the needle to be placed after it, in tokens.
SENTENCE_REACH = 64


@dataclass(frozen=True)
class Trial:
    """One prompt.

    Attributes:
        length: tokens of the prompt and the room for its answer.
        depth: where the needle lies in the filler, 0 to 1.
        prompt: token ids.
        number: the planted number.
        answer_tokens: tokens to decode.

    """

    length: int
    depth: float
    prompt: list[int]
    number: str
    answer_tokens: int


def read_haystack(folder: Path, tokenizer: Any) -> list[int]:
    """Return the tokens of a folder's ``.txt`` files in name order.

    Raises:
        ParetoError: there is none, or one is no UTF-8 text.

    """
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ParetoError(f"--haystack {folder}: no .txt files there")
    tokens: list[int] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ParetoError(f"{file}: cannot be read as UTF-8 text ({error})") from error
        tokens += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def make_trials(
    tokenizer: Any,
    filler: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    per_cell: int,
    seed: int,
) -> list[Trial]:
    """Return the prompts of a grid, cell by cell.

    Each trial has its own key, number and stretch of filler, drawn from ``seed``, the cell and its index: adding a
    length or depth changes no other cell.

    Args:
        tokenizer: the models' tokenizer.
        filler: tokens to plant in, at least some hundreds; repeated where a context is longer.
        lengths: context lengths in tokens.
        depths: 0 to 1.
        per_cell: trials for each length and depth.
        seed: of the draws.

    Raises:
        ParetoError: no filler, or a length that has no room for the needle and the question.

    """
    if not filler:
        raise ParetoError("the haystack is empty")
    prefix = _prefix(tokenizer)
    ends = _sentence_ends(tokenizer, filler)
    trials = []
    for length in lengths:
        for depth in depths:
            for index in range(per_cell):
                draw = random.Random(f"{seed} {length} {depth:.6f} {index}")
                key, number = draw.choice(KEYS), str(draw.randint(10_000, 99_999))
                needle = _encode(tokenizer, NEEDLE.format(key=key, number=number))
                question = _encode(tokenizer, QUESTION.format(key=key))
                answer_tokens = len(_encode(tokenizer, f" {number}.")) + 1
                room = length - len(prefix) - len(needle) - len(question) - answer_tokens
                if room < 1:
                    raise ParetoError(f"needle length {length} is too short: the needle and the question need more")
                offset = draw.randrange(len(filler))
                indices = [(offset + i) % len(filler) for i in range(room)]
                place = _place(ends, indices, round(depth * room))
                body = [filler[i] for i in indices]
                prompt = [*prefix, *body[:place], *needle, *body[place:], *question]
                trials.append(Trial(length, depth, prompt, number, answer_tokens))
    return trials


def _place(ends: set[int], indices: list[int], wanted: int) -> int:
    """Return where to insert: after the last sentence that ends within reach before ``wanted``, else there."""
    for place in range(wanted, max(0, wanted - SENTENCE_REACH), -1):
        if indices[place - 1] in ends:
            return place
    return wanted


def _prefix(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer itself puts in front of a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bare = _encode(tokenizer, "a")
    return list(ids[: len(ids) - len(bare)]) if bare and ids[-len(bare) :] == bare else []


def _sentence_ends(tokenizer: Any, filler: Sequence[int]) -> set[int]:
    """Return the positions in the filler whose token ends a sentence."""
    ending = {token for token in set(filler) if tokenizer.decode([token]).rstrip(" ").endswith((".", "!", "?", "\n"))}
    return {index for index, token in enumerate(filler) if token in ending}


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def is_correct(trial: Trial, answer: str) -> bool:
    """Return whether the first number in a decoded answer is the planted one."""
    found = re.search(r"\d+", answer.replace(",", ""))
    return found is not None and found.group() == trial.number


def summarize(trials: Sequence[Trial], correct: Sequence[bool]) -> Needle:
    """Return the accuracy of each cell, in the trials' order, and over all."""
    cells: dict[tuple[int, float], list[bool]] = {}
    for trial, right in zip(trials, correct, strict=True):
        cells.setdefault((trial.length, trial.depth), []).append(right)
    return Needle(
        accuracy=proportion(sum(correct), len(correct)),
        cells=[NeedleCell(length, depth, proportion(sum(c), len(c))) for (length, depth), c in cells.items()],
    )
