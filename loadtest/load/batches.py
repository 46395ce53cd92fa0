"""Records on their way from a process that sends requests to the one that writes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gevent

from loadtest.results.records import Record


class RecordBatches:
    """Queues the records of this process, and passes them on together every so often.

    Args:
        send: takes a batch: ``records``, ``loop_lag_ms`` (by how much the event loop was late) and ``cpu_s`` (what the
            process has used so far).
        lags: returns by how many ms the event loop was late, since the last call.
        period_s: between batches.

    """

    def __init__(
        self, send: Callable[[dict[str, Any]], None], lags: Callable[[], list[float]], period_s: float
    ) -> None:
        self._send, self._lags, self._period_s = send, lags, period_s
        self._pending: list[dict[str, Any]] = []
        gevent.spawn(self._run)

    def add(self, record: Record) -> None:
        """Queue one record."""
        self._pending.append(record.to_dict())

    def flush(self) -> None:
        """Send what is queued."""
        pending, self._pending = self._pending, []
        lags = self._lags()
        if pending or lags:
            self._send({"records": pending, "loop_lag_ms": lags, "cpu_s": time.process_time()})

    def _run(self) -> None:
        while True:
            gevent.sleep(self._period_s)
            self.flush()


def take_batch(
    batch: dict[str, Any], listener: Callable[[Record], None], lag_listener: Callable[[list[float]], None]
) -> None:
    """Pass on what another process sent: each record, and the late times of its event loop in ms."""
    for data in batch["records"]:
        listener(Record.from_dict(data))
    lag_listener(batch["loop_lag_ms"])
