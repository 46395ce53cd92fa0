"""Does steps on this machine: what is timed has its GPU or the machine to itself, the rest may run side by side."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from subprocess import Popen

from bench.environment import VISIBLE_GPUS, visible_gpus
from bench.server import child
from bench.study.folder import Folder, Outcome
from bench.study.step import CHECKPOINTS, ORDER, Step

GRACE_S = 90.0
"""Seconds that an interrupted step may take: it stops its command, then the server beside it, each with a grace."""
PERFORM, ERRORS = (sys.executable, "-m", "bench.study.perform"), "errors.txt"
UNTIMED = (*CHECKPOINTS, "quality", "tasks")
"""Kinds of steps whose results do not depend on what else the machine does."""


@dataclass
class _Job:
    step: Step
    process: Popen[bytes]
    held: ExitStack
    gpu: str | None


class LocalExecutor:
    """Each step in a process of its own that ends with this one.

    Steps of one GPU are given one each, in turn, where the machine has several and more than one job is allowed. Timed
    steps wait until nothing else runs; then each GPU has one of them, and a machine without GPUs one at a time.

    Args:
        folder: of the study.
        jobs: how many steps that are not timed may run at once.
        gpus: their names for CUDA_VISIBLE_DEVICES; None finds them out.

    """

    def __init__(self, folder: Folder, jobs: int = 1, gpus: list[str] | None = None) -> None:
        self.folder, self.jobs = folder, jobs
        self.gpus = (visible_gpus() if gpus is None else gpus) if jobs > 1 else []
        self._waiting: list[Step] = []
        self._running: list[_Job] = []

    def submit(self, step: Step) -> None:
        """Take a step whose dependencies are done."""
        self._waiting.append(step)
        self._waiting.sort(key=lambda one: ORDER.index(one.kind))

    def running(self) -> list[Step]:
        """Return the steps that are being done now."""
        self._start()
        return [job.step for job in self._running]

    def ended(self, wait_s: float) -> list[tuple[Step, Outcome]]:
        """Return the steps that ended meanwhile, after waiting at most so long for one."""
        self._start()
        deadline = time.monotonic() + wait_s
        while self._running:
            over = [job for job in self._running if job.process.poll() is not None]
            if over:
                self._running = [job for job in self._running if job not in over]
                found = []
                for job in over:
                    job.held.close()
                    found.append((job.step, ended(self.folder, job.step, job.process.returncode)))
                return found
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        return []

    def close(self) -> None:
        """Interrupt what runs, as Ctrl-C does, and wait for its end."""
        with ExitStack() as all_of_them:
            for job in self._running:
                # At once: each may take its whole grace.
                with suppress(ProcessLookupError):
                    os.killpg(job.process.pid, signal.SIGINT)
                all_of_them.push(job.held)
        self._running = []

    def _start(self) -> None:
        while self._waiting and (gpu := self._room(self._waiting[0])) is not None:
            step, held = self._waiting.pop(0), ExitStack()
            process = held.enter_context(performing(self.folder, step, {VISIBLE_GPUS: gpu} if gpu else {}))
            self._running.append(_Job(step, process, held, gpu))

    def _room(self, step: Step) -> str | None:
        """Return the GPU on which a step can start now, empty where it sees them all; None where it has to wait."""
        untimed = step.kind in UNTIMED
        if any((job.step.kind in UNTIMED) != untimed for job in self._running):
            return None
        spread = len(self.gpus) > 1 and step.gpus <= 1
        # A job that sees all GPUs has them to itself.
        if self._running and not (spread or untimed):
            return None
        if any(not job.gpu for job in self._running) and (spread or not untimed):
            return None
        if len(self._running) >= (self.jobs if untimed else max(len(self.gpus), 1)):
            return None
        if not spread:
            return ""
        busy = Counter(job.gpu for job in self._running)
        gpu = min(self.gpus, key=lambda one: busy[one])
        return gpu if untimed or not busy[gpu] else None


@contextmanager
def performing(folder: Folder, step: Step, variables: Mapping[str, str] | None = None) -> Iterator[Popen[bytes]]:
    """Do a step in a process of its own, with some environment variables, interrupted when the block is left early."""
    with (folder.of(step.key) / ERRORS).open("wb") as errors:
        command = [*PERFORM, str(folder.out.resolve()), step.key]
        with child(command, errors.fileno(), GRACE_S, variables) as process:
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
