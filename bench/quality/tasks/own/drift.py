"""How long free answers are and how much they repeat themselves: what drifts under compression without an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def score(doc: dict[str, Any], results: list[str], tokenizer: Any) -> dict[str, float]:
    """Return an answer's length and repetition, in tokens of the model's own tokenizer.

    ``repeated_4grams`` is the share of 4-grams that stood before (seq-rep-4, Welleck et al. 2020), ``distinct_1`` and
    ``distinct_2`` that of different tokens and pairs (Li et al. 2016), within one answer. An answer of fewer tokens
    repeats nothing.
    """
    tokens = list(tokenizer(results[0], add_special_tokens=False).input_ids)
    return {
        "tokens": float(len(tokens)),
        "repeated_4grams": 1.0 - distinct(tokens, 4),
        "distinct_1": distinct(tokens, 1),
        "distinct_2": distinct(tokens, 2),
    }


def distinct(tokens: Sequence[int], n: int) -> float:
    """Return the share of n-grams that are different; 1 where there is none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
