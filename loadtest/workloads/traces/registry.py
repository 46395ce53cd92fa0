"""The formats of traces, and what turns any of them into requests on their times."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import ModuleType

from loadtest.errors import LoadTestError
from loadtest.workloads.tables import iter_rows
from loadtest.workloads.traces import burstgpt, mooncake, otel, own
from loadtest.workloads.traces.entry import Entry

FORMATS: dict[str, ModuleType] = {"mooncake": mooncake, "burstgpt": burstgpt, "otel": otel, "records": own}
"""Each has ``matches(row)`` and ``entries(row, where)``."""


def read_trace(path: Path, name: str = "auto") -> list[Entry]:
    """Return the requests of a trace in order of time, the first at 0 s.

    Args:
        path: of the trace, in any format that :func:`loadtest.workloads.tables.iter_rows` reads.
        name: a key of ``FORMATS``, or ``auto`` to know it by its first row.

    Raises:
        LoadTestError: the file or a row is no good, or no format fits.

    """
    rows = iter_rows(path, "--trace")
    where, first = next(rows)
    if name == "auto":
        name = next((each for each, format_ in FORMATS.items() if format_.matches(first)), "")
        if not name:
            raise LoadTestError(f"{where}: no trace that is known; expected one of {', '.join(FORMATS)}")
    elif not FORMATS[name].matches(first):
        raise LoadTestError(f"{where}: no row of the format {name}")
    found = [entry for place, row in chain([(where, first)], rows) for entry in FORMATS[name].entries(row, place)]
    if not found:
        raise LoadTestError(f"--trace {path}: no requests in the trace")
    begin = min(entry.at_s for entry in found)
    # Sorting keeps the order of requests that came at the same time.
    shifted = [Entry(e.at_s - begin, e.input_tokens, e.output_tokens, e.blocks) for e in found]
    return sorted(shifted, key=lambda entry: entry.at_s)
