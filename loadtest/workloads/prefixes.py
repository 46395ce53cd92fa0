"""Pools of prefixes that prompts share, as system prompts and documents are shared: what a prefix cache lives on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loadtest.errors import LoadTestError

_MOST = 100_000


@dataclass(frozen=True)
class PrefixPool:
    """Prefixes, and how often each is used.

    Attributes:
        tokens: length of each prefix, in tokens; 0 is a prompt without one.
        weights: how often each is drawn, relative to the others.

    """

    tokens: tuple[int, ...] = (0,)
    weights: tuple[float, ...] = (1.0,)

    def generators(self, seed: int) -> Iterator[tuple[np.random.Generator, int]]:
        """Yield the source of randomness and the length of each prefix; all of a run's stages share them."""
        for number, tokens in enumerate(self.tokens):
            yield np.random.default_rng([seed, 0, number] if number else [seed, 0]), tokens

    def choose(self, rng: np.random.Generator) -> int:
        """Draw the number of a prefix."""
        if len(self.tokens) == 1:
            return 0
        share = np.cumsum(self.weights)
        return int(np.searchsorted(share, rng.random() * share[-1], side="right"))


def parse_prefix_pool(text: str) -> PrefixPool:
    """Read ``COUNT:TOKENS[:WEIGHT]``, several of them separated by commas.

    ``32:2048`` is 32 prefixes of 2048 tokens each, all drawn equally often; ``32:2048:3,1000:256:1`` draws three
    requests of four from the first 32.

    Raises:
        LoadTestError: it does not fit.

    """
    tokens: list[int] = []
    weights: list[float] = []
    for word in text.split(","):
        parts = word.strip().split(":")
        try:
            count, length = int(parts[0]), int(parts[1])
            weight = float(parts[2]) if len(parts) == 3 else 1.0 * count
        except (ValueError, IndexError):
            count, length, weight = 0, 0, 0.0
        if len(parts) > 3 or count < 1 or length < 0 or not 0 < weight < math.inf or len(tokens) + count > _MOST:
            raise LoadTestError(
                f"--prefix-pool {text}: expected COUNT:TOKENS[:WEIGHT],... with a count from 1 to {_MOST}, "
                "tokens from 0 and a weight above 0"
            )
        tokens += [length] * count
        weights += [weight / count] * count
    return PrefixPool(tuple(tokens), tuple(weights))
