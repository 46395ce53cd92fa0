"""How far a stage has come: counted by the one process that sends it, or by several in memory that they share."""

from __future__ import annotations

from multiprocessing.context import BaseContext


def share(total: int, part: tuple[int, int]) -> int:
    """Return how many of ``total`` things are process ``i``'s of ``n``, where ``part`` is (i, n)."""
    return len(range(part[0], total, part[1]))


class Counts:
    """Counts of one process: of the present stage, and its requests in flight.

    Attributes:
        in_flight: requests that are due and have not ended.
        warmups: warm-up requests of a closed loop whose numbers were taken.
        sent: measured requests, or conversations, that were begun.
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
        """Measured requests begun."""
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
        """Return the number of another measured request, which counts as sent; None where ``limit`` were."""
        if limit is not None and self._sent >= limit:
            return None
        self._sent += 1
        return self._sent - 1

    def note_sent(self) -> None:
        """Count a measured request whose number was known beforehand."""
        self._sent += 1

    def note_ended(self) -> None:
        """Count the end of a measured request."""
        self._ended += 1

    def change_in_flight(self, by: int) -> None:
        """Count requests that became due, or ended."""
        self._in_flight += by


class SharedCounts(Counts):
    """The same for processes that send a stage together, in memory of all of them.

    Numbers of requests come from one counter under a lock, so users of several processes take them as users of one do.
    The other counts have a place for each process, which alone writes to it, and are added up when they are read. An
    instance is handed to a process when that is started.

    Args:
        processes: how many there are.
        context: that starts them.

    """

    def __init__(self, processes: int, context: BaseContext) -> None:
        self._place = 0
        self._numbers = context.Array("q", 2)
        self._flag = context.RawValue("b", 0)
        self._all_in_flight, self._all_sent, self._all_ended = (context.RawArray("q", processes) for _ in range(3))
        super().__init__()

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
        return int(self._numbers[0])

    @property
    def sent(self) -> int:
        """Measured requests begun, by all processes."""
        return int(self._numbers[1]) + sum(self._all_sent)

    @property
    def ended(self) -> int:
        """Measured requests ended, of all processes."""
        return sum(self._all_ended)

    @property
    def closed(self) -> bool:
        """Whether no further request may begin."""
        return bool(self._flag.value)

    @closed.setter
    def closed(self, value: bool) -> None:
        self._flag.value = value

    def begin_stage(self) -> None:
        """Count from nothing again; only while no process sends."""
        self._numbers[:] = [0, 0]
        for counts in (self._all_sent, self._all_ended):
            counts[:] = [0] * len(counts)
        self._flag.value = 0

    def take_warmup(self, limit: int) -> int | None:
        """Return the number of another warm-up request; None where ``limit`` of them were taken."""
        return self._next(0, limit)

    def take(self, limit: int | None) -> int | None:
        """Return the number of another measured request; None where ``limit`` were taken."""
        return self._next(1, limit)

    def _next(self, counter: int, limit: int | None) -> int | None:
        with self._numbers.get_lock():
            number = int(self._numbers[counter])
            if limit is not None and number >= limit:
                return None
            self._numbers[counter] = number + 1
        return number

    def note_sent(self) -> None:
        """Count a measured request whose number was known beforehand."""
        self._all_sent[self._place] += 1

    def note_ended(self) -> None:
        """Count the end of a measured request."""
        self._all_ended[self._place] += 1

    def change_in_flight(self, by: int) -> None:
        """Count requests of this process that became due, or ended."""
        self._all_in_flight[self._place] += by

    def forget_in_flight(self, number: int) -> None:
        """Count nothing as in flight of process ``number``, which is gone."""
        self._all_in_flight[number] = 0
