"""Does steps on this machine, one after the other: what is timed must have the machine to itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from subprocess import Popen, TimeoutExpired

from bench.server import child
from bench.study.folder import Folder, Outcome
from bench.study.step import ORDER, Step

GRACE_S = 90.0
"""Seconds that an interrupted step may take: it stops its command, then the server beside it, each with a grace."""
PERFORM, ERRORS = (sys.executable, "-m", "bench.study.perform"), "errors.txt"


class LocalExecutor:
    """One step at a time, each in a process of its own that ends with this one.

    Args:
        folder: of the study.

    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._waiting: list[Step] = []
        self._running: tuple[Step, Popen[bytes]] | None = None
        self._held = ExitStack()

    def submit(self, step: Step) -> None:
        """Take a step whose dependencies are done."""
        self._waiting.append(step)
        self._waiting.sort(key=lambda one: ORDER.index(one.kind))

    def running(self) -> list[Step]:
        """Return the steps that are being done now."""
        self._start()
        return [self._running[0]] if self._running else []

    def ended(self, wait_s: float) -> list[tuple[Step, Outcome]]:
        """Return the steps that ended meanwhile, after waiting at most so long for one."""
        self._start()
        if self._running is None:
            return []
        step, process = self._running
        try:
            status = process.wait(timeout=wait_s)
        except TimeoutExpired:
            return []
        self._held.close()
        self._running = None
        return [(step, ended(self.folder, step, status))]

    def close(self) -> None:
        """Interrupt what runs, as Ctrl-C does, and wait for its end."""
        self._held.close()
        self._running = None

    def _start(self) -> None:
        if self._running is None and self._waiting:
            step = self._waiting.pop(0)
            self._running = step, self._held.enter_context(performing(self.folder, step))


@contextmanager
def performing(folder: Folder, step: Step) -> Iterator[Popen[bytes]]:
    """Do a step in a process of its own, interrupted when the block is left early."""
    with (folder.of(step.key) / ERRORS).open("wb") as errors:
        command = [*PERFORM, str(folder.out.resolve()), step.key]
        with child(command, errors.fileno(), grace_s=GRACE_S) as process:
            yield process


def ended(folder: Folder, step: Step, status: int) -> Outcome:
    """Return the outcome of a step whose process ended with a status."""
    outcome = folder.recorded(step.key)
    if outcome is not None and status in (0, 1):
        return outcome
    text = (folder.of(step.key) / ERRORS).read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return Outcome("failed", f"its process ended {how}{': ' + lines[-1][:300] if lines else ''}", "", 0.0)
