"""Watches one stage while it runs: whether the server falls behind for good, and what it serves meanwhile."""

from __future__ import annotations

import gevent

from loadtest import clock
from loadtest.load.saturation import SaturationWatch
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.results import records
from loadtest.results.records import Record
from loadtest.stage_spec import HOLD

_PERIOD_S = 0.1
# Before this much time a queue that only fills looks like one that grows.
_SOONEST_S = 3.0


class StageMonitor:
    """Samples the requests in flight of one stage, and takes its records.

    Args:
        stage: which.
        sink: knows the requests in flight.
        early: whether to close the stage as soon as the server is certainly over-saturated.

    Attributes:
        cut_short: whether the stage was closed before its time.
        rising: whether the queue grew while requests were being sent, as far as is known.
        saturated: whether it did beyond doubt.

    """

    def __init__(self, stage: Stage, sink: Sink, *, early: bool) -> None:
        self.cut_short = False
        self.rising = self.saturated = False
        self.kept: list[Record] = []
        self._stage, self._sink = stage, sink
        self._early = early
        # Under a load that changes, what is in flight rises with it: that is no sign of a queue.
        steady = stage.spec.shape == HOLD and stage.spec.rate is not None and not stage.spec.max_concurrency
        self._watch = SaturationWatch(stage.spec.rate) if steady and stage.spec.rate is not None else None
        self._greenlet = gevent.spawn(self._run)

    def observe(self, record: Record) -> None:
        """Take one finished request."""
        if record.warmup or self._stage.measured_from is None:
            return
        self.kept.append(record)
        if self._watch is not None:
            self._watch.observe(record, clock.to_unix(self._stage.measured_from))

    def stop(self) -> None:
        """Stop watching."""
        self._greenlet.kill()

    def throughput(self) -> float:
        """Return the successful requests per second between the first end and the last, while users kept coming."""
        ends = sorted(each.intended_unix_s + each.end_s for each in self.kept if each.outcome == records.OK)
        if len(ends) < 2 or ends[-1] <= ends[0]:
            return 0.0
        # Requests that end together, as those of a batch do, would count the first batch but not its time.
        ends = ends[len(ends) // 4 :]
        later = [end for end in ends if end > ends[0] + 0.005]
        return len(later) / (ends[-1] - ends[0]) if later else 0.0

    def _run(self) -> None:
        stage = self._stage
        while stage.measured_from is None:
            gevent.sleep(_PERIOD_S)
        duration = stage.spec.duration_s
        while not stage.exhausted():
            elapsed = stage.elapsed()
            if self._watch is not None:
                self._watch.sample(elapsed, self._sink.in_flight)
                if self._early and elapsed >= _SOONEST_S and self._watch.rising(certain=True):
                    self.rising = self.saturated = True
                    # What is in flight is awaited: a backlog left to the server would spoil the next stage.
                    stage.closed = True
                    self.cut_short = True
                    return
            left = _PERIOD_S if duration is None else min(_PERIOD_S, duration - elapsed)
            gevent.sleep(max(0.001, left))
        if self._watch is not None:
            self.rising, self.saturated = self._watch.rising(), self._watch.rising(certain=True)
