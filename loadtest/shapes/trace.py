"""The times of a recorded trace: each request is meant to start when it did then, or faster or slower by a factor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from loadtest.errors import LoadTestError
from loadtest.shapes.shape import Segment, Shape


class Trace(Shape):
    """An open loop on given times.

    Args:
        times: intended starts in seconds from the begin of the stage, ascending, at least one.
        speed: 2 replays in half the time.

    Raises:
        LoadTestError: there are no times, or they do not ascend.

    """

    def __init__(self, times: Sequence[float], speed: float = 1.0) -> None:
        if not len(times):
            raise LoadTestError("the trace holds no request")
        if times[0] < 0 or any(later < earlier for earlier, later in pairwise(times)):
            raise LoadTestError("the times of the trace must be 0 or more and ascend")
        self._times, self._speed = times, speed
        super().__init__([Segment(max(times[-1] / speed, 1e-9), self.mean_rate, self.mean_rate)])

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self._times)

    @property
    def mean_rate(self) -> float:
        """Requests per second over the whole of it; of one moment, as if it took a second."""
        return len(self._times) / (self._times[-1] / self._speed or 1.0)

    def starts(self, arrivals: Iterable[float]) -> Iterator[float]:
        """Yield the times, whatever ``arrivals`` are."""
        for time in self._times:
            yield time / self._speed
