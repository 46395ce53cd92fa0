"""What all shapes have in common: a level, of users or of requests per second, that changes along straight lines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loadtest.errors import LoadTestError
from loadtest.stage_spec import StageSpec


@dataclass(frozen=True)
class Segment:
    """A part of a shape: ``seconds`` in which the level goes from ``begin`` to ``end``, evenly."""

    seconds: float
    begin: float
    end: float

    @property
    def area(self) -> float:
        """Requests that become due in it."""
        return (self.begin + self.end) / 2 * self.seconds

    def time_of(self, area: float) -> float:
        """Return the seconds after its begin in which ``area`` requests become due."""
        slope = 0.0 if math.isinf(self.seconds) else (self.end - self.begin) / self.seconds
        # The root of begin * t + slope * t^2 / 2 = area in the form that also holds for a slope of 0.
        root = math.sqrt(max(0.0, self.begin**2 + 2 * slope * area))
        return 2 * area / (self.begin + root) if self.begin + root > 0 else 0.0

    def reaches(self, level: float, after: float) -> float | None:
        """Return when the level is ``level`` or more for the first time, not before ``after``; None if it never is."""
        if after >= self.seconds:
            return None
        slope = 0.0 if math.isinf(self.seconds) else (self.end - self.begin) / self.seconds
        if self.begin + slope * after >= level:
            return after
        crossing = (level - self.begin) / slope if slope > 0 else math.inf
        return crossing if crossing <= self.seconds and math.isfinite(crossing) else None


class Shape:
    """How the load of a stage goes over time, in seconds after its measured phase begins.

    A shape of its own is a subclass with a line in :mod:`loadtest.shapes.registry`.

    Args:
        segments: one after the other; the last may have no end.

    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)

    @classmethod
    def parse(cls, profile: str) -> Shape:
        """Return the shape that its flag describes.

        Raises:
            LoadTestError: it does not describe one.

        """
        raise NotImplementedError

    @property
    def peak(self) -> float:
        """The highest level."""
        return max(max(segment.begin, segment.end) for segment in self.segments)

    @property
    def seconds(self) -> float:
        """How long it lasts; infinite when it has no end."""
        return sum(segment.seconds for segment in self.segments)

    def users(self, elapsed: float) -> int:
        """Return the number of users of a closed loop: the level, rounded."""
        begin = 0.0
        for segment in self.segments:
            if elapsed < begin + segment.seconds:
                if math.isinf(segment.seconds):
                    return math.floor(segment.begin + 0.5)
                share = (elapsed - begin) / segment.seconds
                return math.floor(segment.begin + share * (segment.end - segment.begin) + 0.5)
            begin += segment.seconds
        return 0

    def wait(self, number: int, elapsed: float) -> float | None:
        """Return the seconds until user ``number`` (from 0) of a closed loop may send; None if it never may again."""
        begin = 0.0
        for segment in self.segments:
            moment = segment.reaches(number + 0.5, max(0.0, elapsed - begin))
            if moment is not None:
                return max(0.0, begin + moment - elapsed)
            begin += segment.seconds
        return None

    def starts(self, arrivals: Iterable[float]) -> Iterator[float]:
        """Yield when each request of an open loop is meant to start; ``arrivals`` are due one a second on average."""
        segments, before, begin = iter(self.segments), 0.0, 0.0
        segment = next(segments)
        for area in arrivals:
            while area - before >= segment.area:
                before, begin = before + segment.area, begin + segment.seconds
                following = next(segments, None)
                if following is None:
                    return
                segment = following
            yield begin + segment.time_of(area - before)


class Hold(Shape):
    """One level all the time: ``--concurrency`` and ``--rate``."""

    def __init__(self, level: float) -> None:
        super().__init__([Segment(math.inf, level, level)])


@dataclass(frozen=True)
class Level:
    """A number of users, or of requests per second."""

    value: float
    is_rate: bool


_LEVEL = re.compile(r"(\d+(?:\.\d+)?)(/s)?")


def parse_level(text: str) -> Level:
    """Read ``4`` (users) or ``2.5/s`` (requests per second).

    Raises:
        LoadTestError: it is neither.

    """
    match = _LEVEL.fullmatch(text)
    if match is None or (match[2] is None and "." in match[1]):
        raise LoadTestError(f"{text or 'nothing'}: expected a number of users as 4, or of requests a second as 4/s")
    return Level(float(match[1]), match[2] is not None)


def parse_seconds(text: str) -> float:
    """Read a time above 0 as ``90``, ``90s``, ``1.5m`` or ``1h``, in seconds.

    Raises:
        LoadTestError: it is none.

    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise LoadTestError(f"{text or 'nothing'}: expected a time above 0 as 90, 90s, 1.5m or 1h")
    return seconds


def hold(spec: StageSpec) -> Hold:
    """Return the shape of a stage of one level."""
    return Hold(float(spec.rate if spec.rate is not None else spec.concurrency or 1))
