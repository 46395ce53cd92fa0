"""A mock server in a process of its own, so that it takes no time from the load test's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.errors import LoadTestError

_TICKS = os.sysconf("SC_CLK_TCK")


class MockProcess:
    """A running ``python -m loadtest.mock_server``.

    Attributes:
        url: its address.
        command: what was run.

    """

    def __init__(self, process: subprocess.Popen[str], command: list[str]) -> None:
        assert process.stdout is not None
        self.command = command
        self._pid = process.pid
        line = process.stdout.readline()
        if not line:
            raise LoadTestError(f"the mock server did not start: {' '.join(command)}")
        self.url = line.split()[-1]

    def cpu_s(self) -> float:
        """Return the seconds of CPU that it has used."""
        fields = Path(f"/proc/{self._pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def mock_process(*words: object) -> Iterator[MockProcess]:
    """Start one on a free port, with these further flags; it ends with the context.

    Raises:
        LoadTestError: it did not start.

    """
    command = [sys.executable, "-m", "loadtest.mock_server", "--port", "0", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield MockProcess(process, command)
        finally:
            process.kill()
