"""``--processes N``: several processes that send each stage together; the parent's side.

One stream of requests is shared: of an open loop process i sends every N-th request, of a closed loop it has every
N-th user, and all users take their numbers from one counter. So the requests are those of a single process.

The parent says ``stage`` to all. Each sends its part of the warm-up, and says ``warm`` when none of that is in flight.
When all have said so, the parent says ``go`` with a moment by the clock that they share, at which all begin to measure.
Records come in batches, and after the last of a stage ``ended``. ``cancel`` ends a stage early, ``quit`` the process.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import gevent
from gevent.event import Event

from loadtest import clock
from loadtest.errors import LoadTestError
from loadtest.load.batches import take_batch
from loadtest.load.counts import SharedCounts
from loadtest.load.link import Link
from loadtest.load.order import Order, obey
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.results.percentiles import distribution
from loadtest.results.schema import Generator

# So much later than the word is given all begin: it must have reached every process by then.
_NOTICE_S = 0.05
_CANCELLED_S, _QUIT_S = 10.0, 5.0


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back, so that processes started meanwhile never see it; this one does afterwards."""
    # When it starts, Python's own helper of such processes lets Ctrl-C through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Member:
    """One process, as the parent sees it."""

    def __init__(self, number: int, process: BaseProcess) -> None:
        self.number, self.process = number, process
        self.link: Link
        self.said = ""
        self.cpu_s = self.cpu_before_s = 0.0


class ProcessLoad:
    """The load that several processes make.

    Args:
        order: what they send; ``part`` says how many there are.
        counts: of the present stage, which they share.
        sink: takes the records of all.
        lag_listener: called by how many seconds the event loop of one of them was late.
        stop: set when one of them dies.

    Attributes:
        error: how one of them died; None while all live.

    Raises:
        LoadTestError: one of them cannot begin.

    """

    def __init__(
        self, order: Order, counts: SharedCounts, sink: Sink, lag_listener: Callable[[float], None], stop: Event
    ) -> None:
        self.error: str | None = None
        self.counts = counts
        self._sink, self._lag_listener, self._stop = sink, lag_listener, stop
        self._lags = array("d")
        self._changed = Event()
        self._leaving = False
        self._members: list[_Member] = []
        with _interrupts_held():
            for number in range(order.part[1]):
                self._start(number, order)
        try:
            # However long: each of them reads the whole data set.
            self._await("ready")
            if self.error is not None:
                raise LoadTestError(self.error)
        except BaseException:
            for member in self._members:
                member.process.kill()
            self.close()
            raise
        for member in self._members:
            member.cpu_before_s = member.cpu_s
        self._lags = array("d")
        self._began, self._cpu = clock.now(), time.process_time()

    def _start(self, number: int, order: Order) -> None:
        ours, theirs = socket.socketpair()
        # A fork would copy gevent's loop and its descriptors.
        process = multiprocessing.get_context("spawn").Process(
            target=obey,
            args=(theirs, self.counts, replace(order, part=(number, order.part[1]))),
            name=f"loadtest-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()
        member = _Member(number, process)
        self._members.append(member)
        member.link = Link(ours, partial(self._listen, member), partial(self._lose, member))

    def begin_measuring(self) -> float:
        """Tell all processes when to begin; returns that moment."""
        moment = clock.now() + _NOTICE_S
        self._tell("go", moment)
        return moment

    def run(self, stage: Stage, stop: Event) -> None:
        """Let all processes send the stage, and wait until all have ended, or until ``stop``."""
        for member in self._members:
            member.said = ""
        self._tell("stage", asdict(stage.spec))
        if self._await("warm", stop):
            stage.begin_measuring()
        if not self._await("ended", stop):
            self._tell("cancel")
            self._await_living("ended")
        for member in self._members:
            # A dead one had requests in flight of which nothing more will be heard.
            if member.said != "ended":
                self.counts.forget_in_flight(member.number)

    def health(self) -> Generator:
        """Return how late the event loops of all processes ran, and what all used, of one core."""
        used = time.process_time() - self._cpu + sum(each.cpu_s - each.cpu_before_s for each in self._members)
        return Generator(distribution(self._lags), round(100 * used / max(clock.now() - self._began, 1e-9), 1))

    def close(self) -> None:
        """End all processes, by force where one does not listen."""
        self._leaving = True
        self._tell("quit")
        deadline = clock.now() + _QUIT_S
        for member in self._members:
            while member.process.exitcode is None and clock.now() < deadline:
                gevent.sleep(0.01)
            if member.process.exitcode is None:
                member.process.kill()
                member.process.join()
            member.link.close()

    def _tell(self, kind: str, content: Any = None) -> None:
        for member in self._members:
            member.link.send(kind, content)

    def _await(self, word: str, stop: Event | None = None) -> bool:
        """Wait until every process has said ``word``; False when ``stop`` was set or one died before."""
        while self.error is None and not (stop is not None and stop.is_set()):
            if all(member.said == word for member in self._members):
                return True
            self._changed.clear()
            gevent.wait([self._changed, *([stop] if stop is not None else [])], count=1)
        return all(member.said == word for member in self._members)

    def _await_living(self, word: str) -> None:
        """Wait until every process that still lives has said ``word``, but not forever."""
        with gevent.Timeout(_CANCELLED_S, False):
            while any(each.said != word and each.process.exitcode is None for each in self._members):
                self._changed.clear()
                self._changed.wait(0.1)

    def _listen(self, member: _Member, kind: str, content: Any) -> None:
        if kind == "records":
            member.cpu_s = content["cpu_s"]
            take_batch(content, self._sink.take, self._take_lags)
            return
        if kind == "refused":
            self._fail(f"load generator process {member.number + 1} of {len(self._members)}: {content}")
        member.said = kind
        self._changed.set()

    def _take_lags(self, lags_ms: list[float]) -> None:
        self._lags.extend(lags_ms)
        for lag in lags_ms:
            self._lag_listener(lag / 1000)

    def _lose(self, member: _Member) -> None:
        if self._leaving:
            return
        with gevent.Timeout(_QUIT_S, False):
            while member.process.exitcode is None:
                gevent.sleep(0.01)
        code = member.process.exitcode
        how = "hung up" if code is None else f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        self._fail(f"load generator process {member.number + 1} of {len(self._members)} died ({how})")

    def _fail(self, why: str) -> None:
        self.error = self.error or why
        self._stop.set()
        self._changed.set()
