"""When the mock server took each request and let each token go: the truth to hold a load test's numbers against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from loadtest import clock
from loadtest.errors import LoadTestError


@dataclass
class Served:
    """One request, streamed or not. Every ``*_unix_s`` is seconds since the Unix epoch, on a clock that never jumps.

    Attributes:
        number: its place among the bodies received, from 0: index of :attr:`MockServer.requests`.
        received_unix_s: its last byte was read.
        started_unix_s: it left the queue; None when it never did.
        token_unix_s: each chunk with tokens was handed to the socket.
        tokens: how many each of them held.
        ended_unix_s: nothing more is written.

    """

    number: int
    received_unix_s: float
    started_unix_s: float | None = None
    token_unix_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended_unix_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the request's arrival to its first token; None when there was none."""
        return self.token_unix_s[0] - self.received_unix_s if self.token_unix_s else None


class TokenLog:
    """Keeps what was served, in the order of arrival, and appends each request to a file when it has ended.

    Args:
        path: JSON Lines file; None keeps them in memory only.

    Raises:
        LoadTestError: the file cannot be written.

    """

    def __init__(self, path: Path | None = None) -> None:
        self.served: list[Served] = []
        self._file: IO[str] | None = None
        try:
            self._file = path.open("w", encoding="utf-8") if path else None
        except OSError as error:
            raise LoadTestError(f"--log {path}: {error.strerror}") from error

    def begin(self, number: int) -> Served:
        """Note that a request has come."""
        served = Served(number, _now())
        self.served.append(served)
        return served

    def start(self, served: Served) -> None:
        """Note that it is being served."""
        served.started_unix_s = _now()

    def token(self, served: Served, count: int) -> None:
        """Note that a chunk of ``count`` tokens is handed to the socket."""
        served.token_unix_s.append(_now())
        served.tokens.append(count)

    def end(self, served: Served) -> None:
        """Note that nothing more is written for it."""
        served.ended_unix_s = _now()
        if self._file is not None:
            self._file.write(json.dumps(vars(served), separators=(",", ":")) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_token_log(path: Path) -> Iterator[Served]:
    """Yield the requests of a log in the order of their ends, but a torn last line, as a killed server leaves it.

    Raises:
        LoadTestError: another line is not of a log.

    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                served = Served(**json.loads(line))
            except (ValueError, TypeError) as error:
                if not line.endswith("\n"):
                    return
                raise LoadTestError(f"{path}:{number} is not of a mock server's log: {error}") from error
            yield served


def _now() -> float:
    return clock.to_unix(clock.now())
