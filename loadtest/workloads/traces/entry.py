"""One request of a trace, and numbers read from its row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loadtest.errors import LoadTestError


@dataclass(frozen=True, slots=True)
class Entry:
    """One recorded request.

    Attributes:
        at_s: when it came, in seconds on the trace's own clock.
        input_tokens: length of its prompt.
        output_tokens: length of its answer.
        blocks: names of the blocks of its prompt, in order; equal names are equal text. None where the trace says
            nothing about what prompts share: then they share nothing.

    """

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] | None = None


def seconds(value: Any, where: str, column: str) -> float:
    """Return a time from a row, a number or its text.

    Raises:
        LoadTestError: it is no finite number.

    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise LoadTestError(f"{where}: {column} must be a number, not {value!r}")
    return number
