"""Runs a command to its end and samples the processor time of all its processes."""

from __future__ import annotations

import bisect
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.server import child

TICK_S, TREE_S = 0.01, 0.25
"""How often clocks are read, and how often new processes are looked for, which costs more."""
STOPPED_AFTER_S = 20
"""How long a command that was interrupted for taking too long may take to end."""


@dataclass
class Ran:
    """How a command went.

    Attributes:
        exit_status: negative for the number of a signal.
        stopped: it took too long and was stopped.
        started_unix_s: when it was started.
        ended_unix_s: when it had ended.
        times: when its clocks were read, as Unix time.
        cpu_s: processor seconds that all its processes had used by then, those that have ended among them.

    """

    exit_status: int
    stopped: bool
    started_unix_s: float
    ended_unix_s: float
    times: list[float]
    cpu_s: list[float]

    def cpu_at(self, unix_s: float) -> float:
        """Return the processor seconds used by a moment, between two readings in proportion."""
        if not self.times:
            return 0.0
        after = bisect.bisect_left(self.times, unix_s)
        if after == 0:
            return self.cpu_s[0]
        if after == len(self.times):
            return self.cpu_s[-1]
        begin, end = self.times[after - 1], self.times[after]
        share = (unix_s - begin) / (end - begin)
        return self.cpu_s[after - 1] + share * (self.cpu_s[after] - self.cpu_s[after - 1])


@dataclass
class _Clocks:
    """The processor time of a process and its descendants, read until they are gone."""

    root: int
    used: dict[int, float] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)

    def find(self) -> None:
        """Look for processes that have come. One that left its parent is kept, since it was seen before."""
        try:
            children = psutil.Process(self.root).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for pid in (self.root, *(process.pid for process in children)):
            self.used.setdefault(pid, 0.0)

    def read(self) -> float:
        """Return the seconds of all, to the nanosecond that the kernel counts."""
        for pid in self.used.keys() - self.gone:
            try:
                # The kernel's number of another process's clock; see clock_getcpuclockid(3).
                self.used[pid] = time.clock_gettime((~pid << 3) | 2)
            except OSError:
                self.gone.add(pid)
        return sum(self.used.values())


def run(command: list[str], log: Path, variables: Mapping[str, str], limit_s: float) -> Ran:
    """Run a command; one that takes longer than ``limit_s`` is interrupted as by Ctrl-C, and killed soon after.

    Args:
        command: program and arguments.
        log: file for everything it prints.
        variables: of its environment, beside this process's own.
        limit_s: seconds that it may take.

    Raises:
        OSError: it cannot be started.

    """
    times: list[float] = []
    cpu: list[float] = []
    with log.open("wb") as file:
        started = time.time()
        with child(command, file.fileno(), STOPPED_AFTER_S, variables) as process:
            clocks, over = _Clocks(process.pid), threading.Event()

            def sample() -> None:
                look = 0.0
                while not over.wait(TICK_S):
                    if time.monotonic() >= look:
                        clocks.find()
                        look = time.monotonic() + TREE_S
                    used = clocks.read()
                    times.append(time.time())
                    cpu.append(used)

            sampler = threading.Thread(target=sample, daemon=True)
            sampler.start()
            deadline, status = time.monotonic() + limit_s, None
            try:
                while (status := process.poll()) is None and time.monotonic() < deadline:
                    time.sleep(0.02)
                stopped = status is None
                if stopped:
                    process.send_signal(signal.SIGINT)
                    deadline = time.monotonic() + STOPPED_AFTER_S
                    while (status := process.poll()) is None and time.monotonic() < deadline:
                        time.sleep(0.02)
            finally:
                over.set()
                sampler.join()
            ended = time.time()
    return Ran(process.wait(), stopped, started, ended, times, cpu)
