"""One clock for durations, anchored once to the wall clock."""

from __future__ import annotations

import time

# perf_counter never jumps; the single wall-clock reading turns it into a time of day that other processes understand.
_WALL_ANCHOR = time.time()
_PERF_ANCHOR = time.perf_counter()

now = time.perf_counter


def to_unix(moment: float) -> float:
    """Turn a reading of :func:`now` into seconds since the Unix epoch."""
    return _WALL_ANCHOR + (moment - _PERF_ANCHOR)
