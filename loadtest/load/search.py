"""``--find``: the highest request rate that a server sustains, in few stages.

The first stage is a closed loop of many users, whose throughput is a first guess of what the server can do, as in the
sweeps of guidellm. Stages at single rates follow: just below and just above the guess, which mostly settles it, and
else halfway, by ratio, between the highest rate that was sustained and the lowest that was not. Of ``max-rate``, where
stages tell how near they came, each is where a line through all before it says the answer is.
"""

from __future__ import annotations

import math
from dataclasses import replace

from loadtest.load.attainment import Attained, bounds, crossing
from loadtest.results.schema import SearchResult, StageResult
from loadtest.stage_spec import SearchSettings, StageSpec

_BELOW, _ABOVE = 0.98, 1.02
# Where nothing is known yet of one side, the answer is taken to lie within these parts of the guess.
_FLOOR, _CEILING = 0.2, 1.6
# As far as a line through stages is trusted beyond them.
_FARTHEST_DOWN, _FARTHEST_UP = 0.5, 1.3


class RateSearch:
    """Says which stage is next, given how those before went.

    Args:
        settings: what is searched for.
        template: what all stages share: arrival process, warm-up and length.

    """

    def __init__(self, settings: SearchSettings, template: StageSpec) -> None:
        self.settings = settings
        self._template = template
        self._stages = 0
        self._next: float | None = None
        self._sustained: float | None = None
        self._refused: float | None = None
        self._floor = 0.0
        self._ceiling: float | None = None
        self._invalid = 0
        self._repeated: set[float] = set()
        self._attained: list[Attained] = []

    def next_stage(self) -> StageSpec | None:
        """Return the next stage; None when the answer is near enough, or all stages are used."""
        if self._stages >= self.settings.max_stages or self._converged() or (self._stages and self._next is None):
            return None
        index, self._stages = self._stages, self._stages + 1
        if self._next is None:
            return replace(
                self._template, index=index, concurrency=self.settings.users, rate=None, max_concurrency=None
            )
        return replace(self._template, index=index, concurrency=None, rate=self._next)

    def guess(self, throughput: float) -> None:
        """Take the requests per second of the first stage."""
        self._next = throughput * _BELOW if throughput > 0 else None
        self._floor = throughput * _FLOOR

    def judge(
        self, rate: float, sustained: bool, invalid: bool = False, attained: tuple[int, int] | None = None
    ) -> None:
        """Take how a stage at ``rate`` went.

        A stage that failed while the load generator itself was late (``invalid``) says nothing of the server: it is
        repeated once, and believed only if that comes to the same. ``attained`` are the good requests and all that
        ended, where being good is what is searched for.
        """
        if invalid and not sustained:
            if rate not in self._repeated:
                self._repeated.add(rate)
                self._next = rate
                return
            self._invalid += 1
        if attained is not None:
            self._attained.append(Attained(rate, *attained))
        if sustained:
            self._sustained = rate if self._sustained is None else max(rate, self._sustained)
        else:
            self._refused = rate if self._refused is None else min(rate, self._refused)
        if sustained and self._refused is None:
            # The guess is mostly right, so its other side is looked at first.
            if self._ceiling is None:
                self._next, self._ceiling = rate / _BELOW * _ABOVE, rate * _CEILING
                return
            if rate * (1 + self.settings.tolerance) >= self._ceiling:
                self._ceiling *= _CEILING
        elif not sustained and self._sustained is None and rate <= self._floor * (1 + self.settings.tolerance):
            self._floor *= _FLOOR
        self._next = self._by_line() or math.sqrt(
            (self._sustained or self._floor) * (self._refused or self._ceiling or rate)
        )

    def _by_line(self) -> float | None:
        """Return where the stages so far say the answer is, not too far from them; None where they do not say."""
        if not self._attained:
            return None
        rates = [each.rate for each in self._attained]
        found, _ = crossing(self._attained, self.settings.attainment)
        return min(max(found, min(rates) * _FARTHEST_DOWN), max(rates) * _FARTHEST_UP)

    def met(self, result: StageResult, rising: bool) -> bool:
        """Whether a stage was sustained: its queue did not grow, and enough of its requests were good.

        Good is without an error, and for ``max-rate`` within the limits of ``--goodput``.
        """
        counts = result.requests
        if rising or not counts.ok:
            return False
        attained = counts.ok / (counts.ok + counts.failed)
        if self.settings.goal == "max-rate" and result.goodput is not None:
            attained = result.goodput.fraction
        return attained >= self.settings.attainment

    def attained(self, result: StageResult, rising: bool) -> tuple[int, int] | None:
        """Return the good requests of a stage and all that ended; None where being good is not what is searched for."""
        if self.settings.goal != "max-rate" or result.goodput is None:
            return None
        good, ended = result.goodput.good, result.requests.ok + result.requests.failed
        # A queue that grows would soon spoil the rest, so the stage counts as one that missed twice what is allowed.
        return min(good, int(ended * max(0.0, 2 * self.settings.attainment - 1))) if rising else good, ended

    def result(self) -> SearchResult:
        """Return what is known now."""
        low, high = self._sustained, self._refused
        found = crossing(self._attained, self.settings.attainment)[0] if self._attained else None
        return SearchResult(
            self.settings.goal,
            low,
            high,
            self._stages,
            self._converged(),
            self._invalid,
            found,
        )

    def _converged(self) -> bool:
        low, high = self._sustained, self._refused
        if self._attained:
            _, error = crossing(self._attained, self.settings.attainment)
            low, high = bounds(self._attained, self.settings.attainment)
            return 2 * error <= self.settings.tolerance or high <= low * (1 + self.settings.tolerance)
        return low is not None and high is not None and high <= low * (1 + self.settings.tolerance)
