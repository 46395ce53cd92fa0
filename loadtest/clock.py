"""One clock for durations, anchored once to the wall clock."""

from __future__ import annotations

import time

# perf_counter never jumps, and all processes of a machine read the same; the single wall-clock reading turns it into a
# time of day that other machines understand.
_anchor = time.time() - time.perf_counter()

now = time.perf_counter


def to_unix(moment: float) -> float:
    """Turn a reading of :func:`now` into seconds since the Unix epoch."""
    return _anchor + moment


def anchor() -> float:
    """Return what :func:`to_unix` adds."""
    return _anchor


def share_anchor(anchor: float) -> None:
    """Add the same as another process of this machine, so that the times of both fit each other exactly."""
    global _anchor  # noqa: PLW0603
    _anchor = anchor
