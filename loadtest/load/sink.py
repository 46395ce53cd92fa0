"""Where finished requests go: the record file and the exporter."""

from __future__ import annotations

from collections.abc import Callable

from loadtest.load.counts import Counts
from loadtest.results.records import Record


class Sink:
    """Passes each finished request on, and counts those in flight.

    Args:
        listeners: called with every record, in this order.
        counts: where those in flight are counted, by default in the sink alone.

    """

    def __init__(self, *listeners: Callable[[Record], None], counts: Counts | None = None) -> None:
        self._listeners = list(listeners)
        self._counts = counts or Counts()
        self.ok = 0
        self.failed = 0

    @property
    def in_flight(self) -> int:
        """Requests that are due and have not ended."""
        return self._counts.in_flight

    def listen(self, listener: Callable[[Record], None]) -> None:
        """Pass records on to one more."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[Record], None]) -> None:
        """Pass no further record on to it."""
        self._listeners.remove(listener)

    def begin(self) -> None:
        """Note that a request has become due."""
        self._counts.change_in_flight(1)

    def end(self, record: Record) -> None:
        """Note that it has ended, and pass its record on."""
        self._counts.change_in_flight(-1)
        self.take(record)

    def take(self, record: Record) -> None:
        """Pass on the record of a request that another process sent."""
        if record.outcome == "ok":
            self.ok += 1
        elif record.outcome == "error":
            self.failed += 1
        for listener in self._listeners:
            listener(record)
