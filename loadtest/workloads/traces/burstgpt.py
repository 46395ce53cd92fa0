"""BurstGPT's traces: CSV of Timestamp (s), Model, Request tokens and Response tokens (arXiv:2401.17644)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.workloads.tables import whole_number
from loadtest.workloads.traces.entry import Entry, seconds

_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def matches(row: Any) -> bool:
    """Whether a row is of this format."""
    return isinstance(row, dict) and set(_COLUMNS) <= set(row)


def entries(row: Any, where: str) -> Iterator[Entry]:
    """Yield the request of a row; none for one that failed, which has no response tokens.

    Raises:
        LoadTestError: a field is missing or wrong.

    """
    if not matches(row):
        raise LoadTestError(f"{where}: expected the columns {', '.join(_COLUMNS)}")
    output = whole_number(row["Response tokens"], where, "Response tokens", least=0)
    tokens = whole_number(row["Request tokens"], where, "Request tokens", least=0)
    if output and tokens:
        yield Entry(seconds(row["Timestamp"], where, "Timestamp"), tokens, output)
