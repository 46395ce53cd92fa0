"""How far a stage has come: counted by the one process that sends it, or by several in memory that they share."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from multiprocessing.reduction import DupFd
from typing import Any

# Places in the shared memory before those of the processes.
_WARMUPS, _SENT, _CLOSED, _SHARED = range(4)


def share(total: int, part: tuple[int, int]) -> int:
    """Return how many of ``total`` things are process ``i``'s of ``n``, where ``part`` is (i, n)."""
    return len(range(part[0], total, part[1]))


class Counts:
    """Counts of one process: of the present stage, and its requests in flight.

    Attributes:
        in_flight: requests that are due and have not ended.
        warmups: warm-up requests of a closed loop whose numbers were taken.
        sent: measured requests, or conversations, of a closed loop that were begun.
        ended: those of them that are over.
        closed: whether no further one may begin.

    """

    def __init__(self) -> None:
        self._in_flight = 0
        self.begin_stage()

    @property
    def in_flight(self) -> int:
        """Requests due and not ended."""
        return self._in_flight

    @property
    def warmups(self) -> int:
        """Warm-up requests begun, of a closed loop."""
        return self._warmups

    @property
    def sent(self) -> int:
        """Measured requests begun, of a closed loop."""
        return self._sent

    @property
    def ended(self) -> int:
        """Measured requests ended."""
        return self._ended

    @property
    def closed(self) -> bool:
        """Whether no further request may begin."""
        return self._closed

    @closed.setter
    def closed(self, value: bool) -> None:
        self._closed = value

    def begin_stage(self) -> None:
        """Count from nothing again, but for what is in flight."""
        self._warmups = self._sent = self._ended = 0
        self._closed = False

    def take_warmup(self, limit: int) -> int | None:
        """Return the number of another warm-up request; None where ``limit`` of them were taken."""
        if self._warmups >= limit:
            return None
        self._warmups += 1
        return self._warmups - 1

    def take(self, limit: int | None) -> int | None:
        """Return the number of another measured request of a closed loop; None where ``limit`` were."""
        if limit is not None and self._sent >= limit:
            return None
        self._sent += 1
        return self._sent - 1

    def note_ended(self) -> None:
        """Count the end of a measured request."""
        self._ended += 1

    def change_in_flight(self, by: int) -> None:
        """Count requests that became due, or ended."""
        self._in_flight += by


class SharedCounts(Counts):
    """The same for processes that send a stage together, in memory of all of them (Linux's memfd).

    Numbers of requests come from one counter under a lock that the kernel takes back from a process that dies, so users
    of several processes take them as users of one do. The other counts have a place for each process, which alone
    writes to it, and are added up when they are read. An instance is handed to a process when that is started.

    Args:
        processes: how many there are.
        descriptor: of the memory, where another process has made it.

    """

    def __init__(self, processes: int, descriptor: int | None = None) -> None:
        self._processes, self._place = processes, 0
        size = _SHARED + 2 * processes
        self._descriptor = os.memfd_create("loadtest-counts") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self._descriptor, 8 * size)
        self._all = memoryview(mmap.mmap(self._descriptor, 8 * size)).cast("q")
        self._all_in_flight, self._all_ended = (
            self._all[begin : begin + processes] for begin in range(_SHARED, size, processes)
        )

    def __reduce__(self) -> Any:
        """Return how the process that is being started makes its own."""
        return _attach, (self._processes, DupFd(self._descriptor))

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def take_place(self, number: int) -> None:
        """Be process ``number`` from now on, from 0."""
        self._place = number

    @property
    def in_flight(self) -> int:
        """Requests due and not ended, of all processes."""
        return sum(self._all_in_flight)

    @property
    def warmups(self) -> int:
        """Warm-up requests begun by all processes, of a closed loop."""
        return self._all[_WARMUPS]

    @property
    def sent(self) -> int:
        """Measured requests begun by all processes, of a closed loop."""
        return self._all[_SENT]

    @property
    def ended(self) -> int:
        """Measured requests ended, of all processes."""
        return sum(self._all_ended)

    @property
    def closed(self) -> bool:
        """Whether no further request may begin."""
        return bool(self._all[_CLOSED])

    @closed.setter
    def closed(self, value: bool) -> None:
        self._all[_CLOSED] = value

    def begin_stage(self) -> None:
        """Count from nothing again; only while no process sends."""
        for place in range(_SHARED):
            self._all[place] = 0
        for place in range(self._processes):
            self._all_ended[place] = 0

    def take_warmup(self, limit: int) -> int | None:
        """Return the number of another warm-up request; None where ``limit`` of them were taken."""
        return self._next(_WARMUPS, limit)

    def take(self, limit: int | None) -> int | None:
        """Return the number of another measured request; None where ``limit`` were taken."""
        return self._next(_SENT, limit)

    def _next(self, counter: int, limit: int | None) -> int | None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            number = self._all[counter]
            if limit is not None and number >= limit:
                return None
            self._all[counter] = number + 1
            return number
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def note_ended(self) -> None:
        """Count the end of a measured request."""
        self._all_ended[self._place] += 1

    def change_in_flight(self, by: int) -> None:
        """Count requests of this process that became due, or ended."""
        self._all_in_flight[self._place] += by

    def forget_in_flight(self, number: int) -> None:
        """Count nothing as in flight of process ``number``, which is gone."""
        self._all_in_flight[number] = 0


def _attach(processes: int, descriptor: Any) -> SharedCounts:
    return SharedCounts(processes, descriptor.detach())
