"""``--ramp FROM:TO:TIME``: the load grows (or shrinks) evenly, and then stays until the stage ends."""

from __future__ import annotations

import math

from loadtest.errors import LoadTestError
from loadtest.shapes.shape import Segment, Shape, parse_level, parse_seconds


class Ramp(Shape):
    """From one level to another in some seconds; it stays there if ``--duration`` is longer.

    Args:
        begin: first level.
        end: last level.
        seconds: time from one to the other.

    """

    def __init__(self, begin: float, end: float, seconds: float) -> None:
        super().__init__([Segment(seconds, begin, end), Segment(math.inf, end, end)])
        self._ramp_s = seconds

    @property
    def seconds(self) -> float:
        """Its own length, without what ``--duration`` adds."""
        return self._ramp_s

    @classmethod
    def parse(cls, profile: str) -> Ramp:
        """Read ``1:20:60s``, or ``1/s:20/s:60s``."""
        words = profile.split(":")
        if len(words) != 3:
            raise LoadTestError("expected FROM:TO:TIME, as 1:20:60s for users or 1/s:20/s:60s for requests a second")
        begin, end = parse_level(words[0]), parse_level(words[1])
        if begin.is_rate != end.is_rate and begin.value > 0:
            raise LoadTestError("expected FROM and TO both in users or both in requests a second (/s)")
        if max(begin.value, end.value) <= 0:
            raise LoadTestError("expected FROM or TO above 0")
        return cls(begin.value, end.value, parse_seconds(words[2]))
