"""Requests of an open loop, made before they are due."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import gevent

from loadtest import clock
from loadtest.load.stage import Ticket

SECONDS, MOST = 2.0, 64
"""How long before it is due a request may be made, and how many may wait at once."""

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes the requests of arrivals before they are due, so that of those due at one moment none waits for the others.

    A trace in steps of seconds, or a high rate, has many requests due together, and the making of a long prompt takes
    milliseconds. What is drawn ahead and not sent in the end is nowhere counted.

    Args:
        arrivals: seconds after the begin of the phase, ascending, and the request's ticket.
        make: makes what is to be sent.

    """

    def __init__(self, arrivals: Iterator[tuple[float, Ticket]], make: Callable[[Ticket], T]) -> None:
        self._arrivals = arrivals
        self._make = make
        self._made: deque[tuple[float, Ticket, T]] = deque()
        self._drawn: tuple[float, Ticket] | None = None
        self._zero: float | None = None

    def fill(self) -> None:
        """Make what is due soon, as long as nothing that is made has to be sent."""
        while len(self._made) < MOST and not self._pressing():
            self._drawn = self._drawn or next(self._arrivals, None)
            if self._drawn is None or (self._made and self._left(self._drawn[0]) > SECONDS):
                return
            self._made.append((*self._drawn, self._make(self._drawn[1])))
            self._drawn = None
            # Answers that have come are read between two.
            gevent.sleep(0)

    def due(self, zero: float) -> Iterator[tuple[float, Ticket, T]]:
        """Yield each request when it is due, with its offset in seconds and its ticket.

        Args:
            zero: when the phase begins, in seconds of :mod:`loadtest.clock`.

        """
        self._zero = zero
        while True:
            self.fill()
            if not self._made:
                return
            gevent.sleep(max(0.0, self._left(self._made[0][0])))
            yield self._made.popleft()

    def _left(self, offset: float) -> float:
        """Return the seconds until ``offset``, or those between the begin and it where nothing has begun."""
        return offset if self._zero is None else self._zero + offset - clock.now()

    def _pressing(self) -> bool:
        return self._zero is not None and bool(self._made) and self._left(self._made[0][0]) <= 0
