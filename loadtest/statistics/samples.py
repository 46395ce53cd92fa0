"""The measured requests of one stage as arrays, in the order in which they were meant to start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from loadtest.results.records import Record

QUANTITIES = ("ttft", "tpot", "itl", "e2e")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ragged:
    """Values that belong to requests: none, one or many each.

    Attributes:
        values: float64[m], in milliseconds.
        owner: int64[m], ascending: the request of each value.

    """

    values: Floats
    owner: NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """The measured requests of a stage that ended, n of them.

    Attributes:
        start: float64[n], ascending: intended start, Unix seconds.
        end: float64[n], Unix seconds.
        ok: bool[n], whether the request succeeded.
        good: bool[n], whether it met every limit of ``--goodput``; False for failures.
        output_tokens: float64[n], 0 for failures, NaN where nobody counted them.
        quantities: of the successes, by name in ``QUANTITIES``.
        has_slo: whether there were limits for ``good`` to meet.
        whole: the stage that this is a part of; None when this is all of it.

    """

    start: Floats
    end: Floats
    ok: NDArray[np.bool_]
    good: NDArray[np.bool_]
    output_tokens: Floats
    quantities: dict[str, Ragged]
    has_slo: bool
    whole: Samples | None = None

    def __len__(self) -> int:
        return len(self.start)

    def part(self, first: int, last: int) -> Samples:
        """Return the requests ``first`` to ``last`` (exclusive)."""
        cut = {}
        for name, ragged in self.quantities.items():
            low, high = np.searchsorted(ragged.owner, (first, last))
            cut[name] = Ragged(ragged.values[low:high], ragged.owner[low:high] - first)
        each = (self.start, self.end, self.ok, self.good, self.output_tokens)
        start, end, ok, good, tokens = (values[first:last] for values in each)
        return Samples(start, end, ok, good, tokens, cut, self.has_slo, self.whole or self)  # type: ignore[arg-type]


class SampleCollector:
    """Collects the records of one stage. Warm-up and cancelled requests are left out.

    Args:
        slo_ms: limits for goodput: any of ``ttft``, ``tpot`` and ``e2el``.

    """

    def __init__(self, slo_ms: Mapping[str, float]) -> None:
        self._slo = slo_ms
        self._rows: list[tuple[float, float, bool, bool, float]] = []
        self._values: list[dict[str, list[float]]] = []

    def add(self, record: Record) -> None:
        """Take one record."""
        if record.warmup or record.outcome == "cancelled":
            return
        ok = record.outcome == "ok"
        values: dict[str, list[float]] = {}
        if ok:
            first, tpot = record.first_token_s, record.tpot_s
            values = {
                "ttft": [] if first is None else [first * 1000],
                "tpot": [] if tpot is None else [tpot * 1000],
                "itl": [(after - before) * 1000 for before, after in pairwise(record.token_s)],
                "e2e": [record.end_s * 1000],
            }
        limits = {"e2e" if name == "e2el" else name: limit for name, limit in self._slo.items()}
        good = ok and all(value <= limit for name, limit in limits.items() for value in values.get(name, []))
        counted = record.counted_output_tokens
        tokens = 0.0 if not ok else math.nan if counted is None else float(counted)
        begin = record.intended_unix_s
        self._rows.append((begin, begin + record.end_s, ok, good, tokens))
        self._values.append(values)

    def samples(self) -> Samples:
        """Return what was collected."""
        order = sorted(range(len(self._rows)), key=lambda i: self._rows[i][0])
        rows = [self._rows[i] for i in order]
        columns = list(zip(*rows, strict=True)) if rows else [(), (), (), (), ()]
        quantities = {}
        for name in QUANTITIES:
            lists = [self._values[i].get(name, []) for i in order]
            counts = [len(each) for each in lists]
            values = np.array([value for each in lists for value in each], dtype=np.float64)
            quantities[name] = Ragged(values, np.repeat(np.arange(len(lists)), counts))
        return Samples(
            np.array(columns[0], dtype=np.float64),
            np.array(columns[1], dtype=np.float64),
            np.array(columns[2], dtype=np.bool_),
            np.array(columns[3], dtype=np.bool_),
            np.array(columns[4], dtype=np.float64),
            quantities,
            bool(self._slo),
        )
