"""``--steps LEVEL:TIME ...``: levels one after the other, within one stage."""

from __future__ import annotations

from loadtest.errors import LoadTestError
from loadtest.shapes.shape import Segment, Shape, parse_level, parse_seconds


class Steps(Shape):
    """Levels that each last for some seconds; the stage ends with the last one."""

    @classmethod
    def parse(cls, profile: str) -> Steps:
        """Read ``4:30 16:30``, or ``2/s:30 8/s:1m``."""
        segments, kinds = [], set()
        for word in profile.split():
            level_text, colon, seconds = word.partition(":")
            if not colon:
                raise LoadTestError(f"{word}: expected LEVEL:TIME, as 4:30 for users or 4/s:30 for requests a second")
            level = parse_level(level_text)
            if level.value <= 0:
                raise LoadTestError(f"{word}: expected a level above 0")
            kinds.add(level.is_rate)
            segments.append(Segment(parse_seconds(seconds), level.value, level.value))
        if len(kinds) != 1:
            raise LoadTestError("expected steps all in users or all in requests a second (/s)")
        return cls(segments)
