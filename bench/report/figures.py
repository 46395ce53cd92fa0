"""A figure with its uncertainty or a remark, and how numbers are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.schema import Estimate

NONE = "\u2013"


@dataclass(frozen=True)
class Figure:
    """A value of one metric.

    Attributes:
        value: in the metric's unit.
        note: what stands below it; None shows the standard error there.
        standard_error: of the value, None if unknown.
        low: lower end of the 95% interval, None if unknown.
        high: upper end.
        n: independent units behind it, None if that is not known.

    """

    value: float
    note: str | None = ""
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def maybe(cls, value: float | None) -> Figure | None:
        """Return a value without uncertainty; None for None."""
        return None if value is None else cls(value)

    @classmethod
    def of(cls, estimate: Estimate | None, note: str | None = None) -> Figure | None:
        """Return an estimate, with its standard error or a note below it; None for None."""
        if estimate is None:
            return None
        return cls(estimate.value, note, estimate.standard_error, estimate.low, estimate.high, estimate.n)

    @classmethod
    def interval(cls, share: Estimate) -> Figure | None:
        """Return a share, with its 95% interval below it."""
        return cls.of(share, "" if share.low is None else f"{share.low:.0%} to {share.high:.0%}")

    def below(self, show: Callable[[float], str]) -> str:
        """Return what stands below the value."""
        if self.note is not None:
            return self.note
        return "" if self.standard_error is None else f"± {show(self.standard_error)}"


def number(form: str, suffix: str = "") -> Callable[[float], str]:
    """Return a writer of numbers by a format specification."""
    return lambda value: format(value, form) + suffix


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{value:.1%}"


def milliseconds(value: float) -> str:
    """Return milliseconds, with a decimal below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
