"""Prompts that are as long as those of a trace, and share their beginnings as those did, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from loadtest.workloads.prompt import FIRST, Phase, Prompt
from loadtest.workloads.prompts import TokenCost
from loadtest.workloads.traces.entry import Entry
from loadtest.workloads.traces.mooncake import BLOCK_TOKENS

_KEPT_BLOCKS = 4096
_Place = tuple[int, ...]


class TracePrompts:
    """The prompts of a trace, in its order; after its end it begins again, with other text.

    Text is different in each stage, in its warm-up and in each round, so that no cache knows it from before.

    Args:
        entries: the trace, at least one request.
        seed: of the text.
        cost: of words, to make prompts of them; ignored with ``ids``.
        ids: bounds of token ids, to make prompts of those.

    """

    def __init__(
        self, entries: Sequence[Entry], seed: int, cost: TokenCost | None = None, ids: tuple[int, int] | None = None
    ) -> None:
        assert cost or ids, "prompts are made of words or of token ids"
        self._entries = entries
        self._seed = seed
        self._cost = cost or TokenCost(1.0, 0.0, (), "none")
        self._ids = ids
        self._block_units = round(BLOCK_TOKENS / self._cost.per_word) + 1
        self._block: Callable[[_Place], np.ndarray] = lru_cache(_KEPT_BLOCKS)(self._draw)

    @property
    def times(self) -> list[float]:
        """When each request is meant to start, ascending, in seconds from the first."""
        return [entry.at_s for entry in self._entries]

    def prompt(self, rng: np.random.Generator, index: int, phase: Phase = FIRST) -> Prompt:
        """Return the prompt of request ``index``; the seed and the trace alone determine it, not ``rng``."""
        round_, number = divmod(index, len(self._entries))
        entry = self._entries[number]
        units = self._units(entry, number, (self._seed, 3, phase.stage, int(phase.warmup), round_))
        if self._ids:
            return Prompt(units, entry.input_tokens, entry.output_tokens)
        # Every prompt begins with the word that the calibration began with; see WordPrompts.
        words = self._cost.words
        text = " ".join([words[0], *(words[unit] for unit in units[1:])])
        return Prompt(text, entry.input_tokens, entry.output_tokens)

    def _units(self, entry: Entry, number: int, place: _Place) -> list[int]:
        """Return the words of a prompt by their numbers, or its token ids."""
        wanted = entry.input_tokens if self._ids else self._cost.words_for(entry.input_tokens)
        names: list[_Place]
        if entry.blocks is not None:
            names = [(1, block) for block in entry.blocks]
        else:
            # Blocks that no other request has are named by the request, apart from those that the trace names.
            names = [(2, number, block) for block in range(-(-entry.input_tokens // BLOCK_TOKENS))]
        units: list[int] = []
        for position, name in enumerate(names, 1):
            # Where a block ends depends on its position alone, so that equal beginnings stay equal.
            end = min(wanted, round(position * BLOCK_TOKENS / self._cost.per_word))
            units += self._block((*place, *name))[: end - len(units)].tolist()
        return units

    def _draw(self, place: _Place) -> np.ndarray:
        low, high = self._ids or (0, len(self._cost.words))
        return np.random.default_rng(place).integers(low, high, size=self._block_units)
