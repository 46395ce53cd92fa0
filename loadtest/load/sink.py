"""Where finished requests go: the record file and the exporter."""

from __future__ import annotations

from collections.abc import Callable

from loadtest.results.records import Record


class Sink:
    """Passes each finished request on, and counts those in flight.

    Args:
        listeners: called with every record, in this order.

    """

    def __init__(self, *listeners: Callable[[Record], None]) -> None:
        self._listeners = list(listeners)
        self.in_flight = 0
        self.ok = 0
        self.failed = 0

    def listen(self, listener: Callable[[Record], None]) -> None:
        """Pass records on to one more."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[Record], None]) -> None:
        """Pass no further record on to it."""
        self._listeners.remove(listener)

    def begin(self) -> None:
        """Note that a request has become due."""
        self.in_flight += 1

    def end(self, record: Record) -> None:
        """Note that it has ended, and pass its record on."""
        self.in_flight -= 1
        if record.outcome == "ok":
            self.ok += 1
        elif record.outcome == "error":
            self.failed += 1
        for listener in self._listeners:
            listener(record)
