"""The formats of traces, and what turns any of them into requests on their times."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from loadtest.errors import LoadTestError
from loadtest.workloads.tables import read_rows
from loadtest.workloads.traces import burstgpt, mooncake, otel, own
from loadtest.workloads.traces.entry import Entry

FORMATS: dict[str, ModuleType] = {"mooncake": mooncake, "burstgpt": burstgpt, "otel": otel, "records": own}
"""Each has ``matches(row)`` and ``entries(row, where)``."""


def read_trace(path: Path, name: str = "auto") -> list[Entry]:
    """Return the requests of a trace in order of time, the first at 0 s.

    Args:
        path: of the trace, in any format that :func:`loadtest.workloads.tables.read_rows` reads.
        name: a key of ``FORMATS``, or ``auto`` to know it by its first row.

    Raises:
        LoadTestError: the file or a row is no good, or no format fits.

    """
    rows = read_rows(path, "--trace")
    if name == "auto":
        name = next((each for each, format_ in FORMATS.items() if format_.matches(rows[0][1])), "")
        if not name:
            raise LoadTestError(f"{rows[0][0]}: no trace that is known; expected one of {', '.join(FORMATS)}")
    elif not FORMATS[name].matches(rows[0][1]):
        raise LoadTestError(f"{rows[0][0]}: no row of the format {name}")
    found = [entry for where, row in rows for entry in FORMATS[name].entries(row, where)]
    if not found:
        raise LoadTestError(f"--trace {path}: no requests in the trace")
    begin = min(entry.at_s for entry in found)
    # Sorting keeps the order of requests that came at the same time.
    shifted = [Entry(e.at_s - begin, e.input_tokens, e.output_tokens, e.blocks) for e in found]
    return sorted(shifted, key=lambda entry: entry.at_s)
