"""One record per request: what ``records.jsonl`` holds, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from loadtest.errors import LoadTestError

OK, ERROR, CANCELLED = "ok", "error", "cancelled"

# Failure classes, each counted apart. http_other is a redirect or anything else that is neither 2xx, 4xx nor 5xx.
HTTP_429 = "http_429"
HTTP_4XX = "http_4xx"
HTTP_5XX = "http_5xx"
HTTP_OTHER = "http_other"
CONNECTION_REFUSED = "connection_refused"
CONNECTION_ERROR = "connection_error"
TIMEOUT = "timeout"
STREAM_CUT = "stream_cut"
MALFORMED_SSE = "malformed_sse"
STREAM_ERROR = "stream_error"
EMPTY_RESPONSE = "empty_response"
CLIENT_ERROR = "client_error"
ERROR_CLASSES = (
    HTTP_429,
    HTTP_4XX,
    HTTP_5XX,
    HTTP_OTHER,
    CONNECTION_REFUSED,
    CONNECTION_ERROR,
    TIMEOUT,
    STREAM_CUT,
    MALFORMED_SSE,
    STREAM_ERROR,
    EMPTY_RESPONSE,
    CLIENT_ERROR,
)


@dataclass
class Record:
    """One request, from its intended start to its end.

    Every ``*_s`` time but ``intended_unix_s`` is in seconds after the intended start, so a latency that a user would
    feel can be read off directly and time spent waiting to be sent is never lost.

    Attributes:
        stage: index of the stage.
        index: number of the request, or of the conversation that it is a turn of, within its stage and phase.
        warmup: whether the request is left out of the results.
        intended_unix_s: when it was meant to start, seconds since the Unix epoch.
        start_s: when it was sent; 0 up to the generator's lag, more when ``--max-concurrency`` held it back. None
            when it never was.
        first_token_s: first chunk with non-empty content; the last one of an answer that has all the tokens that it
            was to have, none of them with a text; None where nothing is generated (embeddings).
        last_token_s: last chunk that carried a choice; the last token's arrival also when its text was empty.
        token_s: arrival of every chunk with non-empty content.
        end_s: end of the stream, or the moment the failure was noticed.
        requested_prompt_tokens: what the prompt was made for; None for prompts from a file.
        requested_output_tokens: ``max_tokens``.
        prompt_tokens: the server's usage.prompt_tokens; None when it sent none.
        output_tokens: the server's usage.completion_tokens; None when it sent none.
        retokenized_output_tokens: where the server counted nothing, tokens of the answer's text, tokenized again.
        cached_tokens: prompt tokens that the server took from its prefix cache, where it says.
        finish_reason: as the server gave it.
        outcome: ``ok``, ``error`` or ``cancelled``.
        error: one of ``ERROR_CLASSES``.
        status: HTTP status.
        message: what went wrong, at most 300 characters.
        retry_after_s: seconds that a refusing server asked to wait, by its Retry-After header.
        turn: number of the request within its conversation, from 0; ``index`` is that of the conversation.
        held_s: how long ``--max-concurrency`` held it back; the rest of ``start_s`` is the generator's lateness.

    """

    stage: int
    index: int
    warmup: bool = False
    intended_unix_s: float = 0.0
    start_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    requested_prompt_tokens: int | None = None
    requested_output_tokens: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    retokenized_output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    outcome: str = OK
    error: str | None = None
    status: int | None = None
    message: str | None = None
    retry_after_s: float | None = None
    turn: int = 0
    held_s: float = 0.0

    def fail(self, error: str, message: str) -> None:
        """Mark the request as failed in class ``error``; the first failure is the cause and stays."""
        if self.outcome == OK:
            self.outcome, self.error, self.message = ERROR, error, " ".join(message.split())[:300]

    @property
    def counted_output_tokens(self) -> int | None:
        """Output tokens as the server counted them, else as the text was tokenized again; None when nothing counted.

        The number of chunks does not stand in for it: a server may send several tokens in one.
        """
        return self.retokenized_output_tokens if self.output_tokens is None else self.output_tokens

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None when fewer than two tokens came, or nothing counted them."""
        tokens = self.counted_output_tokens
        if self.first_token_s is None or self.last_token_s is None or tokens is None or tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (tokens - 1)

    def meets(self, slo_ms: Mapping[str, float]) -> bool:
        """Return whether a success kept every limit: any of ``ttft``, ``tpot`` and ``e2el``, in milliseconds.

        A request of one token has no TPOT, and keeps every limit of it.
        """
        measured = {"ttft": self.first_token_s, "tpot": self.tpot_s, "e2el": self.end_s}
        return self.outcome == OK and all((measured[name] or 0.0) * 1000 <= limit for name, limit in slo_ms.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object, times rounded to the microsecond."""
        return {name: _rounded(getattr(self, name)) for name in _NAMES}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Read a record back; unknown keys are ignored, so that newer files stay readable."""
        return cls(**{name: data[name] for name in _NAMES if name in data})


_NAMES = tuple(each.name for each in fields(Record))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [round(each, 6) for each in value]
    return value


class RecordWriter:
    """Appends records to a JSON Lines file, each flushed as it comes so that an interrupted run keeps them all."""

    def __init__(self, path: Path, append: bool = False) -> None:
        self.path = path
        self._file: IO[str] = path.open("a" if append else "w", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record and flush it to the operating system."""
        self._file.write(json.dumps(record.to_dict(), separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a ``records.jsonl``. A torn last line, as a killed run leaves it, is passed over.

    Raises:
        LoadTestError: another line is not a record.

    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield Record.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                if not line.endswith("\n"):
                    return
                raise LoadTestError(f"{path}:{number} is not a load-test record: {error}") from error


def write_json_atomically(path: Path, document: dict[str, Any]) -> None:
    """Write ``document`` to ``path`` so that a reader sees the old file or the whole new one, never a part."""
    write_text_atomically(path, json.dumps(document, indent=2) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the whole new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
