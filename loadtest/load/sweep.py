"""``--find sweep``: rates at even distances from one request at a time to all at once, a stage each.

Where a search homes in on one rate, this shows how latency grows with load on the way there, as guidellm's sweep does.
"""

from __future__ import annotations

from dataclasses import replace

from loadtest.load.search import RateSearch
from loadtest.results.schema import SearchResult
from loadtest.stage_spec import SWEEP, SearchSettings, StageSpec


class RateSweep(RateSearch):
    """Says which stage is next: one user, then many, and then the rates between what these two served.

    The rates rise, and the last is what many users served. The first that is not sustained ends the sweep, since a
    queue that grows tells nothing of the server but that.

    Args:
        settings: ``max_stages`` is the number of stages, the two closed loops included.
        template: what all stages share: arrival process, warm-up and length.

    """

    def __init__(self, settings: SearchSettings, template: StageSpec) -> None:
        super().__init__(settings, template)
        self._served: list[float] = []
        self._rates: list[float] = []

    def next_stage(self) -> StageSpec | None:
        """Return the next stage; None after the last."""
        index, users = self._stages, (1, self.settings.users)
        if index < len(users):
            self._stages += 1
            return replace(self._template, index=index, concurrency=users[index], rate=None, max_concurrency=None)
        if not self._rates:
            return None
        self._stages += 1
        return replace(self._template, index=index, concurrency=None, rate=self._rates.pop(0))

    def guess(self, throughput: float) -> None:
        """Take the requests per second of one user, and then of many."""
        self._served.append(throughput)
        if len(self._served) == 2:
            one, all_at_once = self._served
            count = self.settings.max_stages - 2
            # Three digits: nobody reads more of a rate, and every stage is named by its own.
            rates = (float(f"{one + (all_at_once - one) * place / count:.3g}") for place in range(1, count + 1))
            # A server that many users slow down, or that serves nothing, leaves no rates between.
            self._rates = [rate for rate in rates if rate > one]

    def judge(
        self, rate: float, sustained: bool, invalid: bool = False, attained: tuple[int, int] | None = None
    ) -> None:
        """Take how a stage at ``rate`` went.

        The generator's own lateness counts, but is named in the result. How many requests were good (``attained``) is
        in the stage's row and decides nothing here.
        """
        if sustained:
            self._sustained = rate
            return
        self._refused, self._rates = rate, []
        self._invalid += invalid

    def result(self) -> SearchResult:
        """Return what is known now."""
        ended = self._stages > 2 and not self._rates
        return SearchResult(SWEEP, self._sustained, self._refused, self._stages, ended, self._invalid)


def make_search(settings: SearchSettings, template: StageSpec) -> RateSearch:
    """Return what chooses the stages of ``--find``."""
    return (RateSweep if settings.goal == SWEEP else RateSearch)(settings, template)
