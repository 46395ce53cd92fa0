"""``--max-error-rate``: how many requests of a stage may fail, while it runs and at its end."""

from __future__ import annotations

from gevent.event import Event

from loadtest.results import records
from loadtest.results.records import Record
from loadtest.results.schema import StageResult
from loadtest.stage_spec import StageSpec

# Below this many ended requests a fraction says little, so a stage is cut short only where its end is certain.
_ENOUGH_TO_JUDGE = 20


def exceeded(limit: float, stage: StageResult) -> bool:
    """Whether more than the fraction ``limit`` of the stage's measured requests failed; cancelled ones do not count."""
    return stage.requests.failed > limit * (stage.requests.ok + stage.requests.failed)


class ErrorLimit:
    """Sets ``stop`` as soon as a stage has too many failures. Warm-up requests do not count.

    Args:
        limit: the fraction of measured requests that may fail, 0 to 1; None never stops.
        stop: set when the limit is exceeded: certainly so, because the requests still to come cannot mend it, or by the
            fraction of the first 20 or more that ended.
        conversations: whether a stage's ``requests`` are conversations, of who knows how many requests each.

    """

    def __init__(self, limit: float | None, stop: Event, conversations: bool = False) -> None:
        self.exceeded = False
        self._limit = limit
        self._stop = stop
        self._conversations = conversations
        self._planned: int | None = None
        self._ended = 0
        self._failed = 0

    def begin_stage(self, spec: StageSpec) -> None:
        """Count from nothing again."""
        self._planned, self._ended, self._failed = None if self._conversations else spec.requests, 0, 0

    def over(self) -> bool:
        """Whether too many requests failed, now that no more will come."""
        return self.exceeded or (self._limit is not None and self._failed > self._limit * self._ended)

    def observe(self, record: Record) -> None:
        """Take one finished request."""
        if self._limit is None or record.warmup or record.outcome == records.CANCELLED:
            return
        self._ended += 1
        self._failed += record.outcome == records.ERROR
        certain = self._failed > self._limit * (self._planned or float("inf")) if self._limit else self._failed > 0
        likely = self._ended >= _ENOUGH_TO_JUDGE and self._failed > self._limit * self._ended
        if certain or likely:
            self.exceeded = True
            self._stop.set()
