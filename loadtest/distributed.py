"""Records from Locust's workers to its master, so that percentiles stay exact over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent

from loadtest.records import Record

MESSAGE = "pareto_records"
# Often enough to lose little when a worker dies, rarely enough to cost nothing.
_FLUSH_S = 1.0


class RecordForwarder:
    """The worker's side: collects records and sends them to the master, at the latest at the end of the test.

    Args:
        runner: Locust's worker runner.

    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._pending: list[dict[str, Any]] = []
        gevent.spawn(self._run)

    def add(self, record: Record) -> None:
        """Queue one record."""
        self._pending.append(record.to_dict())

    def flush(self) -> None:
        """Send what is queued. Locust keeps the order of messages, so it arrives before the worker's "stopped"."""
        pending, self._pending = self._pending, []
        if pending:
            self._runner.send_message(MESSAGE, {"records": pending})

    def _run(self) -> None:
        while True:
            gevent.sleep(_FLUSH_S)
            self.flush()


def receive_records(runner: Any, listener: Callable[[Record], None]) -> None:
    """Let the master call ``listener`` with every record that a worker sends."""

    def on_message(environment: Any, msg: Any, **_: Any) -> None:
        for data in msg.data["records"]:
            listener(Record.from_dict(data))

    runner.register_message(MESSAGE, on_message)
