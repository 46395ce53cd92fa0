"""Server-sent events from bytes as they arrive, whatever the boundaries of the reads."""

from __future__ import annotations

from dataclasses import dataclass

_FIELDS = ("data", "event", "id", "retry")


class MalformedSSEError(Exception):
    """The bytes are no event stream."""


@dataclass(frozen=True)
class Event:
    """One dispatched event: its type (``message`` unless named) and its data lines joined by newlines."""

    type: str
    data: str


class SSEParser:
    """Incremental parser of ``text/event-stream``.

    Lines may end in LF, CRLF or CR, a comment starts with a colon, and an event is complete at a blank line. Decoding
    happens a line at a time, so a character split over two reads is whole again. Unlike a browser, which ignores
    them, unknown field names and invalid UTF-8 are errors: a load test must notice a server that talks nonsense.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[str] = []
        self._type = ""
        self._first_line = True

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes and return the events that they complete.

        Raises:
            MalformedSSEError: a line is not UTF-8 or has an unknown field.

        """
        self._buffer += chunk
        events = []
        while (line := self._next_line()) is not None:
            event = self._take(line)
            if event is not None:
                events.append(event)
        return events

    def pending(self) -> bool:
        """Whether an event has begun that no blank line has ended: a stream that stops here was cut."""
        return bool(self._buffer.strip() or self._data)

    def _next_line(self) -> bytes | None:
        buffer = self._buffer
        feed, carriage = buffer.find(b"\n"), buffer.find(b"\r")
        if carriage >= 0 and (feed < 0 or carriage < feed):
            # A CR at the very end may be the first half of a CRLF whose LF has not come yet.
            if carriage + 1 == len(buffer):
                return None
            end, skip = carriage, 2 if buffer[carriage + 1] == 0x0A else 1
        elif feed >= 0:
            end, skip = feed, 1
        else:
            return None
        line = bytes(buffer[:end])
        del buffer[: end + skip]
        return line

    def _take(self, line: bytes) -> Event | None:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedSSEError(f"not UTF-8: {line[:80]!r}") from error
        if self._first_line:
            text = text.removeprefix("\ufeff")
            self._first_line = False
        if not text:
            return self._dispatch()
        name, _, value = text.partition(":")
        if not name and text.startswith(":"):
            return None
        if name not in _FIELDS:
            raise MalformedSSEError(f"not a server-sent event: {text[:80]!r}")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
        return None

    def _dispatch(self) -> Event | None:
        data, kind = self._data, self._type
        self._data, self._type = [], ""
        return Event(kind or "message", "\n".join(data)) if data else None
