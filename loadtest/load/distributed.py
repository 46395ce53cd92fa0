"""Records from Locust's workers to its master, so that percentiles stay exact over all of them.

Workers send their records once a second. When a test stops, Locust's master gives its workers half a second and then
hangs up; so before that the master asks each worker to end its users, and waits until all have sent their last record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from gevent.event import Event

from loadtest.load.batches import RecordBatches, take_batch
from loadtest.results.records import Record

_RECORDS, _FINISH, _FINISHED = "pareto_records", "pareto_finish", "pareto_finished"
_FLUSH_S = 1.0
DRAIN_S = 30.0
_FINISH_TIMEOUT_S = DRAIN_S + 20.0
logger = logging.getLogger(__name__)


def drain(runner: Any) -> None:
    """Let no further request of this process start, await those in flight, and cancel what is left after 30 s."""
    session = getattr(runner.environment, "loadtest_session", None)
    if session is not None:
        session.stage.closed = True
        runner.user_greenlets.join(timeout=DRAIN_S)
    runner.user_greenlets.kill()


class RecordForwarder(RecordBatches):
    """The worker's side.

    Args:
        runner: Locust's worker runner.
        lags: returns by how many ms the event loop was late, since the last call.

    """

    def __init__(self, runner: Any, lags: Callable[[], list[float]]) -> None:
        self._runner = runner
        runner.register_message(_FINISH, self._finish)
        super().__init__(partial(runner.send_message, _RECORDS), lags, _FLUSH_S)

    def _finish(self, environment: Any, msg: Any, **_: Any) -> None:
        drain(self._runner)
        self.flush()
        # Messages of one worker keep their order, so the master has every record when it hears this.
        self._runner.send_message(_FINISHED)


class RecordCollector:
    """The master's side.

    Args:
        runner: Locust's master runner.
        listener: called with every record that a worker sends.
        lag_listener: called with the late times of a worker's event loop, in ms.

    """

    def __init__(
        self, runner: Any, listener: Callable[[Record], None], lag_listener: Callable[[list[float]], None]
    ) -> None:
        self._lag_listener = lag_listener
        self._runner = runner
        self._listener = listener
        self._awaited: set[str] = set()
        self._complete = Event()
        runner.register_message(_RECORDS, self._take)
        runner.register_message(_FINISHED, self._note)

    def finish(self) -> None:
        """Let every worker end its users, and wait until their records are here."""
        self._awaited = {client.id for client in self._runner.clients.all if client.state != "missing"}
        if not self._awaited:
            return
        self._complete.clear()
        self._runner.send_message(_FINISH)
        if not self._complete.wait(_FINISH_TIMEOUT_S):
            logger.error("no last records from worker(s) %s", ", ".join(sorted(self._awaited)))

    def _take(self, environment: Any, msg: Any, **_: Any) -> None:
        take_batch(msg.data, self._listener, self._lag_listener)

    def _note(self, environment: Any, msg: Any, **_: Any) -> None:
        self._awaited.discard(msg.node_id)
        if not self._awaited:
            self._complete.set()
