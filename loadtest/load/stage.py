"""One stage of a run: which request is next, and when the stage is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import gevent
import numpy as np
from gevent.event import Event

from loadtest import clock
from loadtest.load.counts import Counts
from loadtest.shapes.arrivals import ARRIVALS
from loadtest.shapes.registry import make_shape
from loadtest.shapes.shape import Shape, hold
from loadtest.stage_spec import StageSpec


@dataclass(frozen=True)
class Ticket:
    """Leave to send one request: its number, and whether it is warm-up."""

    index: int
    warmup: bool


class Stage:
    """Hands out the requests of one stage.

    Closed loop: users call :meth:`take` for each request and :meth:`done` after it. Warm-up requests come first; the
    measured phase begins when the last of them has ended, so that none of them overlaps it. Open loop: the scheduler
    calls :meth:`begin` for each phase and asks :meth:`arrivals` for its offsets.

    Args:
        spec: what to do.
        seed: of the arrivals.
        gate: called once, when no warm-up request of this process is in flight any more and no measured one was sent
            yet; returns the moment at which the measured phase begins, which has come then.
        shape: how the load goes over time; by default the one that ``spec`` names.
        counts: how far it has come; several processes that send the stage together share them.

    """

    def __init__(
        self,
        spec: StageSpec,
        seed: int,
        gate: Callable[[], float] = clock.now,
        shape: Shape | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.spec = spec
        self.shape = shape or make_shape(spec)
        self.measured_from: float | None = None
        self._counts = counts or Counts()
        self._seed = seed
        self._gate = gate
        self._warming = 0
        self._begun = False
        self._warm = Event()

    @property
    def closed(self) -> bool:
        """Whether no further request may begin, whatever the limits say."""
        return self._counts.closed

    @closed.setter
    def closed(self, value: bool) -> None:
        self._counts.closed = value

    def elapsed(self) -> float:
        """Return the seconds since measuring began; 0 before."""
        return 0.0 if self.measured_from is None else clock.now() - self.measured_from

    def begin(self, warmup: bool) -> float:
        """Begin a phase of an open loop; returns the moment from which the offsets of its requests count."""
        if not warmup:
            self.begin_measuring()
        return clock.now() if self.measured_from is None else self.measured_from

    def begin_measuring(self) -> None:
        """Start the measured phase as soon as the gate opens: ``duration_s`` counts from then."""
        if not self._begun:
            self._begun = True
            self.measured_from = self._gate()
            self._warm.set()

    def take(self, user: int = 0) -> Ticket | None:
        """Return the next request of a closed loop; None when there is no more.

        Waits for the end of the warm-up, and until the shape has room for user number ``user``, from 0.
        """
        number = self._counts.take_warmup(self.spec.warmup)
        if number is not None:
            self._warming += 1
            return Ticket(number, warmup=True)
        if not self._warming:
            self.begin_measuring()
        self._warm.wait()
        self._await_turn(user)
        number = None if self.exhausted() else self._counts.take(self.spec.requests)
        return None if number is None else Ticket(number, warmup=False)

    def _await_turn(self, user: int) -> None:
        while not self.exhausted():
            pause = self.shape.wait(user, self.elapsed())
            if pause == 0:
                return
            left = float("inf") if self.spec.duration_s is None else self.spec.duration_s - self.elapsed()
            # In short naps, because the stage may end by its number of requests meanwhile.
            gevent.sleep(max(0.0, min(left if pause is None else pause, left, 0.5)))

    def done(self, ticket: Ticket) -> None:
        """Note that a request has ended, however it did."""
        if not ticket.warmup:
            self._counts.note_ended()
        elif self.spec.mode == "closed":
            self._warming -= 1
            if not self._warming and self._counts.warmups >= self.spec.warmup:
                self.begin_measuring()

    def exhausted(self) -> bool:
        """Whether no further measured request may start."""
        spec = self.spec
        if self.closed:
            return True
        if spec.requests is not None and self._counts.sent >= spec.requests:
            return True
        return spec.duration_s is not None and self.elapsed() >= spec.duration_s

    def arrivals(
        self, warmup: bool, stream_id: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[float, Ticket]]:
        """Yield (seconds after the phase's start, request) of an open loop's phase, in order of time.

        Args:
            warmup: which phase; warm-up arrives at the stage's rate, whatever its shape.
            stream_id: sets streams of requests apart from each other.
            part: (i, n) yields every n-th request of the stream from number i on: n processes together send the stream.

        """
        spec = self.spec
        rng = np.random.default_rng([self._seed, 2, spec.index, int(warmup), stream_id])
        limit = spec.warmup if warmup else spec.requests
        shape = hold(spec) if warmup else self.shape
        starts = enumerate(shape.starts(ARRIVALS[spec.arrival](rng, spec.burstiness)))
        for index, offset in islice(starts, part[0], limit, part[1]):
            if not warmup and spec.duration_s is not None and offset >= spec.duration_s:
                return
            yield offset, Ticket(index, warmup)

    def progress(self) -> float:
        """Return how much of the measured phase is done, 0 to 1, by whichever limit is nearer."""
        if self.measured_from is None:
            return 0.0
        spec, parts = self.spec, [0.0]
        if spec.requests:
            parts.append(self._counts.ended / spec.requests)
        if spec.duration_s:
            parts.append(self.elapsed() / spec.duration_s)
        return min(1.0, max(parts))
