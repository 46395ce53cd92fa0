"""Made-up prompts of wanted lengths, each determined by the seed, the stage and its number alone.

So request 17 of stage 2 is the same whichever user sends it and whenever, and two runs with one seed send the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from loadtest.errors import LoadTestError
from loadtest.workloads.distributions import TokenDistribution
from loadtest.workloads.prefixes import PrefixPool
from loadtest.workloads.prompt import FIRST, Phase, Prompt

# Frequent short English words, which most tokenizers keep whole. Calibration measures what they really cost.
_FREQUENT = """
the of and to in is was for that with his as at by had not are but from or have an they which one you were all
her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many before must through back years where much your way well down should because each
just those people how too little state good very make world still own see men work long get here between both
life being under never day same another know while last might us great old year off come since against go came
right used take three small place hand house night water white light city next young open far side find head
read line turn land war four group large power school number course point family
"""
WORDS = tuple(_FREQUENT.split())


@dataclass(frozen=True)
class TokenCost:
    """What text costs on the server: ``tokens = overhead + words * per_word``.

    ``words`` are those to build prompts from; ``how`` says how the numbers were found.
    """

    per_word: float
    overhead: float
    words: tuple[str, ...]
    how: str

    def words_for(self, tokens: int) -> int:
        """Return how many words make a prompt of about ``tokens`` tokens, at least one."""
        return max(1, round((tokens - self.overhead) / self.per_word))


# Prompts too short for this many draws to find a new one are few in kind, and shorter than a block of a prefix cache.
_DRAWS = 16


class _Unrepeated:
    """Draws positions until they are not those of another request; the same request may ask again and gets the same.

    Only prompts of a few tokens ever need a second draw. Which of two equal ones is drawn again depends on their order.
    """

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}

    def draw(self, rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
        """Return ``count`` whole numbers in ``[low, high)``."""
        # The state of the generator tells requests apart, since each has a generator of its own.
        owner = int(rng.bit_generator.state["state"]["state"])
        for _ in range(_DRAWS):
            values: list[int] = rng.integers(low, high, size=count).tolist()
            if self._owners.setdefault(hash(tuple(values)), owner) == owner:
                break
        return values


class WordPrompts:
    """Random words after one of the shared prefixes."""

    def __init__(self, lengths: TokenDistribution, prefixes: PrefixPool, cost: TokenCost, seed: int) -> None:
        self._lengths = lengths
        self._cost = cost
        self._prefixes = prefixes
        self._unrepeated = _Unrepeated()
        # The first word has no space before it, so each word may cost something else there. All prompts start with the
        # one that the calibration started with, whose cost is part of the overhead.
        self._starts = [
            [cost.words[0], *(cost.words[i] for i in rng.integers(len(cost.words), size=round(tokens / cost.per_word)))]
            for rng, tokens in prefixes.generators(seed)
        ]

    def prompt(self, rng: np.random.Generator, index: int, phase: Phase = FIRST) -> Prompt:
        """Return a prefix and then a drawn number of random tokens."""
        chosen = self._prefixes.choose(rng)
        start = self._starts[chosen]
        tokens = self._prefixes.tokens[chosen] + self._lengths.sample(rng)
        count = max(0, self._cost.words_for(tokens) - len(start))
        words = self._cost.words
        return Prompt(" ".join([*start, *(words[i] for i in self._unrepeated.draw(rng, 0, len(words), count))]), tokens)

    def further(self, rng: np.random.Generator, lengths: TokenDistribution) -> Prompt:
        """Return what is said in a later turn: a drawn number of random tokens, which the template adds to."""
        tokens = lengths.sample(rng)
        count, words = max(1, round(tokens / self._cost.per_word)), self._cost.words
        return Prompt(" ".join(words[i] for i in rng.integers(len(words), size=count)), tokens)


class TokenIdPrompts:
    """Random token ids in ``[low, high)``: exact lengths without a tokenizer, where the endpoint takes them."""

    def __init__(self, lengths: TokenDistribution, prefixes: PrefixPool, low: int, high: int, seed: int) -> None:
        self._lengths = lengths
        self._low, self._high = low, high
        self._unrepeated = _Unrepeated()
        self._prefixes = prefixes
        self._starts: list[list[int]] = [
            rng.integers(low, high, size=tokens).tolist() for rng, tokens in prefixes.generators(seed)
        ]

    def prompt(self, rng: np.random.Generator, index: int, phase: Phase = FIRST) -> Prompt:
        """Return the ids of a prefix and then a drawn number of random ones."""
        start = self._starts[self._prefixes.choose(rng)]
        ids = self._unrepeated.draw(rng, self._low, self._high, self._lengths.sample(rng))
        return Prompt([*start, *ids], len(start) + len(ids))


class ConversationPrompts:
    """Conversations of made-up turns.

    Args:
        first: makes the first turns.
        turns: draws how many turns a conversation has.
        turn_tokens: draws the length of what the user says in each later turn.
        think_ms: draws the milliseconds from an answer to the next turn; None is no pause.

    """

    def __init__(
        self,
        first: WordPrompts,
        turns: TokenDistribution,
        turn_tokens: TokenDistribution,
        think_ms: TokenDistribution | None,
    ) -> None:
        self._first = first
        self._turns = turns
        self._turn_tokens = turn_tokens
        self._think_ms = think_ms

    def prompt(self, rng: np.random.Generator, index: int, phase: Phase = FIRST) -> Prompt:
        """Return the first prompt of a conversation with those that follow it."""
        first = self._first.prompt(rng, index, phase)
        return replace(
            first,
            follow_ups=tuple(
                replace(self._first.further(rng, self._turn_tokens), think_s=draw_think(self._think_ms, rng))
                for _ in range(self._turns.sample(rng) - 1)
            ),
        )


def draw_think(think_ms: TokenDistribution | None, rng: np.random.Generator) -> float:
    """Return a drawn think time in seconds; 0 for None."""
    return think_ms.sample(rng) / 1000 if think_ms else 0.0


def parse_token_id_range(text: str) -> tuple[int, int]:
    """Read ``HIGH`` or ``LOW:HIGH``.

    Raises:
        LoadTestError: not a non-empty range of token ids.

    """
    low, _, high = text.rpartition(":")
    try:
        bounds = int(low or 0), int(high)
    except ValueError:
        bounds = (0, 0)
    if not 0 <= bounds[0] < bounds[1]:
        raise LoadTestError(f"--prompt-token-ids {text}: expected HIGH or LOW:HIGH with 0 <= LOW < HIGH")
    return bounds
