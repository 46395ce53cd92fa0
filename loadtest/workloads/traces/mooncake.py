"""Mooncake's traces: JSON Lines of timestamp (ms), input_length, output_length and hash_ids (arXiv:2407.00079).

A hash id names a block of 512 tokens together with all before it, so two requests that begin with the same ids begin
with the same text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.workloads.tables import whole_number
from loadtest.workloads.traces.entry import Entry, seconds

BLOCK_TOKENS = 512


def matches(row: Any) -> bool:
    """Whether a row is of this format."""
    return isinstance(row, dict) and {"timestamp", "input_length", "output_length"} <= set(row)


def entries(row: Any, where: str) -> Iterator[Entry]:
    """Yield the request of a row.

    Raises:
        LoadTestError: a field is missing or wrong.

    """
    for name in ("timestamp", "input_length", "output_length"):
        if row.get(name) is None:
            raise LoadTestError(f"{where}: no {name}; expected timestamp, input_length, output_length and hash_ids")
    tokens = whole_number(row["input_length"], where, "input_length")
    output = whole_number(row["output_length"], where, "output_length", least=0)
    ids = row.get("hash_ids")
    blocks = None
    if ids is not None:
        if not (isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids)):
            raise LoadTestError(f"{where}: hash_ids must be a list of whole numbers")
        if len(ids) != -(-(tokens or 0) // BLOCK_TOKENS):
            raise LoadTestError(f"{where}: {len(ids)} hash_ids for {tokens} tokens; one is for {BLOCK_TOKENS} tokens")
        blocks = tuple(ids)
    yield Entry(seconds(row["timestamp"], where, "timestamp") / 1000, tokens or 1, max(1, output or 0), blocks)
