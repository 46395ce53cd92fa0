"""How late the generator's own event loop runs: its share of every measured latency."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

import gevent

from loadtest import clock
from loadtest.results.percentiles import distribution
from loadtest.results.schema import Generator

_PERIOD_S = 0.02


class LoopLag:
    """Sleeps over and over and notes by how much it overslept.

    Args:
        listener: called with each of these times, in seconds.

    """

    def __init__(self, listener: Callable[[float], None] | None = None) -> None:
        self._listener = listener
        self._lags = array("d")
        self._cpu, self._wall = time.process_time(), clock.now()
        self._greenlet = gevent.spawn(self._run)

    def stop(self) -> Generator:
        """Stop and return what was found."""
        self._greenlet.kill()
        wall = max(clock.now() - self._wall, 1e-9)
        return Generator(distribution(self._lags), round(100 * (time.process_time() - self._cpu) / wall, 1))

    def take(self) -> list[float]:
        """Return what was noted since the last call, in milliseconds, and forget it."""
        lags, self._lags = list(self._lags), array("d")
        return lags

    def _run(self) -> None:
        while True:
            due = clock.now() + _PERIOD_S
            gevent.sleep(_PERIOD_S)
            lag = clock.now() - due
            self._lags.append(lag * 1000)
            if self._listener is not None:
                self._listener(lag)
