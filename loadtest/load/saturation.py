"""Whether a server keeps up with an open loop, told from outside: requests in flight, and TTFT, that only ever rise.

A server that is offered more than it can do has a queue that grows as long as the load lasts. Its latencies then
depend on how long one looks, so such a stage says nothing but that the rate is too high, and may end early.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadtest.results import records
from loadtest.results.records import Record

# The first quarter fills the server. What piles up between the second and the last is a queue that grows, if it is more
# than this fraction of the requests that came meanwhile, and more than a request or two of noise.
_GROWTH, _NOISE = 0.01, 1.5
# A stage is cut short only where there can be no doubt.
_CERTAIN_GROWTH, _CERTAIN_NOISE = 0.1, 10.0
_TTFT_RISE = 1.03
_QUARTERS = 4


class SaturationWatch:
    """Collects what one open-loop stage shows of the server's queue.

    Args:
        rate: offered requests per second.

    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._in_flight: list[tuple[float, int]] = []
        self._ttft: list[tuple[float, float]] = []

    def sample(self, elapsed_s: float, in_flight: int) -> None:
        """Note the number of requests in flight, ``elapsed_s`` seconds into the stage; call it at even distances."""
        self._in_flight.append((elapsed_s, in_flight))

    def observe(self, record: Record, begun_unix_s: float) -> None:
        """Take one finished request of a stage that began at ``begun_unix_s``."""
        if record.outcome == records.OK and record.first_token_s is not None:
            self._ttft.append((record.intended_unix_s - begun_unix_s, record.first_token_s))

    def rising(self, *, certain: bool = False) -> bool:
        """Whether the queue grew so far; ``certain`` asks for so much growth that the stage need not go on.

        True when the mean number in flight rose in every quarter after the first, by more than a share of the arrivals
        and more than noise, and TTFT rose as well where enough requests have one. A short stage, or the random arrivals
        of a server near its limit, can look like a growing queue: give stages time.
        """
        growth, noise = (_CERTAIN_GROWTH, _CERTAIN_NOISE) if certain else (_GROWTH, _NOISE)
        quarters = _quarter_means(self._in_flight)
        if quarters is None:
            return False
        span = (self._in_flight[-1][0] - self._in_flight[0][0]) / 2
        if not quarters[1] < quarters[2] < quarters[3]:
            return False
        if quarters[3] - quarters[1] <= max(noise, growth * self._rate * span):
            return False
        ttft = _quarter_means(sorted(self._ttft))
        # A server so far behind that its requests of late have no first token yet has no trend of TTFT to show.
        return ttft is None or ttft[3] > ttft[1] * _TTFT_RISE


def _quarter_means(series: Sequence[tuple[float, float]]) -> list[float] | None:
    """Return the means of a (time, value) series in four equal spans of time; None where one of them has no value."""
    if len(series) < 2 * _QUARTERS:
        return None
    times, values = np.asarray(series, dtype=np.float64).T
    places = np.minimum((times - times[0]) / max(times[-1] - times[0], 1e-9) * _QUARTERS, _QUARTERS - 1).astype(int)
    counts = np.bincount(places, minlength=_QUARTERS)
    if not counts.all():
        return None
    return [float(total) for total in np.bincount(places, weights=values, minlength=_QUARTERS) / counts]
