"""Our own ``records.jsonl``: a run again, at the times at which its requests were meant to start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.workloads.tables import whole_number
from loadtest.workloads.traces.entry import Entry, seconds


def matches(row: Any) -> bool:
    """Whether a row is of this format."""
    return isinstance(row, dict) and "intended_unix_s" in row


def entries(row: Any, where: str) -> Iterator[Entry]:
    """Yield the request of a record; none for one of the warm-up.

    Raises:
        LoadTestError: it has no prompt length, or a field is wrong.

    """
    if not matches(row):
        raise LoadTestError(f"{where}: not a record of a load test")
    if row.get("warmup"):
        return
    found = {}
    for kind in ("prompt_tokens", "output_tokens"):
        # What the server counted; what was asked for where it counted nothing, as for a request that failed.
        name = kind if row.get(kind) else f"requested_{kind}"
        found[kind] = whole_number(row.get(name), where, name)
    if found["prompt_tokens"] is None:
        raise LoadTestError(f"{where}: neither prompt_tokens nor requested_prompt_tokens")
    at = seconds(row["intended_unix_s"], where, "intended_unix_s")
    yield Entry(at, found["prompt_tokens"], found["output_tokens"] or 1)
