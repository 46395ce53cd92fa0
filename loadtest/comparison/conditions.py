"""``--fail-if``: conditions on figures, such as ``p95_ttft > 500`` and ``p95_ttft > +5%``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.errors import LoadTestError
from loadtest.statistics.figures import Figure, parse_figure

ALPHA = 0.05
"""The share of comparisons without a change beyond the limit that may be called one, over all conditions of a call."""
_GRAMMAR = re.compile(r"\s*([\w.]+)\s*([<>])=?\s*([+-]?)(\d+(?:\.\d+)?)\s*(%|ms|s|/s)?\s*")


@dataclass(frozen=True)
class Condition:
    """What must not hold.

    Attributes:
        text: as the user wrote it.
        figure: what is looked at.
        above: whether it fails above the limit, else below.
        limit: of the figure itself in its unit (ms, per second, a fraction); or, where ``relative``, of the change from
            A to B: a fraction of A, and for figures that are fractions the difference itself.
        relative: whether the limit is of a change; it was written with a sign.

    """

    text: str
    figure: Figure
    above: bool
    limit: float
    relative: bool

    def broken_by(self, value: float) -> bool:
        """Whether an absolute condition holds for a figure's value."""
        return value > self.limit if self.above else value < self.limit


def parse_condition(text: str) -> Condition:
    """Return the condition of a text.

    Raises:
        LoadTestError: it is none.

    """
    found = _GRAMMAR.fullmatch(text)
    if not found:
        raise LoadTestError(
            f"--fail-if {text!r}: expected FIGURE > LIMIT or FIGURE < LIMIT, such as 'p95_ttft > 500' for a run, or "
            "with a sign and % 'p95_ttft > +5%' for the change of a comparison"
        )
    try:
        figure = parse_figure(found[1])
    except LoadTestError as error:
        raise LoadTestError(f"--fail-if {text!r}: {error}") from error
    limit, unit = float(found[4]), found[5] or ""
    relative = bool(found[3])
    if relative and unit != "%":
        raise LoadTestError(f"--fail-if {text!r}: a limit with a sign is a change; write it in %, such as +5%")
    if not relative and unit == "%" and figure.kind != "fraction":
        sign = "+" if found[2] == ">" else "-"
        raise LoadTestError(f"--fail-if {text!r}: a change has a sign: {found[1]} {found[2]} {sign}{found[4]}%")
    if not relative and unit not in {"ms": ("", "ms", "s"), "/s": ("", "/s"), "": ("", "%")}[figure.unit]:
        raise LoadTestError(f"--fail-if {text!r}: {figure.name} is in {figure.unit or '0 to 1 or %'}, not in {unit}")
    if unit == "%":
        limit /= 100
    elif unit == "s":
        limit *= 1000
    if relative and found[3] == "-":
        limit = -limit
    if relative and figure.kind != "fraction" and limit <= -1:
        raise LoadTestError(f"--fail-if {text!r}: nothing falls by 100% or more")
    return Condition(" ".join(text.split()), figure, found[2] == ">", limit, relative)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Return which tests reject, so that the chance of any false one is at most ``ALPHA`` (Holm 1979)."""
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, index in enumerate(order):
        if math.isnan(p_values[index]) or p_values[index] > ALPHA / (len(order) - rank):
            break
        rejected[index] = True
    return rejected
