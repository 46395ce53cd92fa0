"""Spans of OpenTelemetry's GenAI conventions: OTLP as JSON, or spans one by one with their attributes as an object.

Only lengths and times are taken. What was asked is seldom recorded, because it may be private.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.workloads.tables import whole_number
from loadtest.workloads.traces.entry import Entry, seconds

# Today's names and those before them, which vLLM's own spans still have.
_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_START = ("startTimeUnixNano", "start_time_unix_nano", "start_time")


def matches(row: Any) -> bool:
    """Whether a row is of this format."""
    return isinstance(row, dict) and ("resourceSpans" in row or ("attributes" in row and any(n in row for n in _START)))


def entries(row: Any, where: str) -> Iterator[Entry]:
    """Yield the requests of a row: those of its spans that say how many tokens went in.

    Raises:
        LoadTestError: a span has no start, or a count is no whole number.

    """
    if not isinstance(row, dict):
        raise LoadTestError(f"{where}: expected an object with resourceSpans")
    try:
        spans = [
            span
            for resource in row.get("resourceSpans", ())
            for scope in resource.get("scopeSpans", ())
            for span in scope.get("spans", ())
        ]
        attributes = [_attributes(span.get("attributes")) for span in (spans or [row])]
    except (AttributeError, TypeError, KeyError) as error:
        raise LoadTestError(f"{where}: not OTLP as JSON: {error}") from error
    for span, named in zip(spans or [row], attributes, strict=True):
        tokens = whole_number(_first(named, _INPUT), where, _INPUT[0])
        if tokens is None:
            continue
        output = whole_number(_first(named, _OUTPUT), where, _OUTPUT[0], least=0)
        yield Entry(_start(span, where), tokens, max(1, output or 0))


def _attributes(found: Any) -> dict[str, Any]:
    if isinstance(found, list):
        return {each["key"]: next(iter(each["value"].values()), None) for each in found}
    return dict(found or {})


def _first(named: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((named[name] for name in names if named.get(name) is not None), None)


def _start(span: dict[str, Any], where: str) -> float:
    value = _first(span, _START)
    if isinstance(value, str) and not value.isdigit():
        try:
            return datetime.datetime.fromisoformat(value).timestamp()
        except ValueError:
            raise LoadTestError(f"{where}: start_time {value!r} is no time") from None
    if value is None:
        raise LoadTestError(f"{where}: a span has no startTimeUnixNano")
    return seconds(value, where, "startTimeUnixNano") / 1e9
