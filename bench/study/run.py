"""Does the steps of a study in their order, and says how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench.study.folder import Folder, Outcome
from bench.study.step import ORDER, Step
from bench.study.steps import Graph
from quant_methods.progress import EVERY

WAITING, RUNNING, DONE, FAILED, SKIPPED, BEFORE = "waiting", "running", "done", "failed", "skipped", "done before"


class Executor(Protocol):
    """What carries out steps."""

    def submit(self, step: Step) -> None:
        """Take a step whose dependencies are done."""

    def running(self) -> list[Step]:
        """Return the steps that are being done now."""

    def ended(self, wait_s: float) -> list[tuple[Step, Outcome]]:
        """Return the steps that ended meanwhile, after waiting at most so long for one."""

    def close(self) -> None:
        """Interrupt what runs and wait for its end."""


@dataclass
class State:
    """Where a step is.

    Attributes:
        status: ``waiting``, ``running``, ``done``, ``failed``, ``skipped`` or ``done before``.
        reason: why it failed or was skipped, or of a step that is done, why a part of it failed.
        since: monotonic clock at its start.
        seconds: that it took.

    """

    status: str = WAITING
    reason: str = ""
    since: float = 0.0
    seconds: float = 0.0


@dataclass
class Progress:
    """How far a study is: its steps' states, in their order."""

    graph: Graph
    folder: Folder
    states: dict[str, State] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def counts(self) -> str:
        """Return how many steps are where, in words."""
        found = [state.status for state in self.states.values()]
        done = found.count(DONE) + found.count(BEFORE)
        others = [f"{found.count(name)} {name}" for name in (FAILED, SKIPPED) if name in found]
        return ", ".join([f"{done} of {len(found)} steps done", *others])

    def of(self, status: str) -> list[tuple[Step, State]]:
        """Return the steps in a state."""
        return [(self.graph.steps[key], state) for key, state in self.states.items() if state.status == status]

    def line(self) -> str:
        """Return where it is, in one line."""
        running = []
        for key, state in self.states.items():
            if state.status == RUNNING:
                now = time.monotonic() - state.since
                running.append(f"{self.graph.steps[key].name} ({now:.0f} s: {self.folder.last_line(key)[:80]})")
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes}:{seconds:02d}  {self.counts()}; {'; '.join(running) or 'waiting'}"

    def table(self) -> Table:
        """Return the steps as a table: those running, failed or finished last, and how many wait."""
        table = Table(title=f"{self.graph.plan.study}: {self.counts()}", title_justify="left", expand=True)
        for heading in ("step", "state", "s", "now"):
            table.add_column(heading, no_wrap=True, justify="right" if heading == "s" else "left")
        shown = [key for key, state in self.states.items() if state.status in (RUNNING, FAILED)]
        shown += [key for key, state in self.states.items() if state.status == DONE][-6:]
        for key in [key for key in self.states if key in shown][-20:]:
            state = self.states[key]
            seconds = time.monotonic() - state.since if state.status == RUNNING else state.seconds
            now = self.folder.last_line(key) if state.status == RUNNING else state.reason
            table.add_row(
                self.graph.steps[key].name, state.status, f"{seconds:.0f}", now[:100], style=_STYLE[state.status]
            )
        return table


_STYLE = {RUNNING: "bold", FAILED: "red", DONE: "green"}


def look(graph: Graph, folder: Folder, hardware: Sequence[str], kinds: Sequence[str] = ORDER) -> Progress:
    """Return how far a study is already.

    Args:
        graph: the steps.
        folder: of their results.
        hardware: labels whose steps are to be done; those of others are skipped.
        kinds: of steps that are to be done; others are skipped.

    """
    progress = Progress(graph, folder)
    for step in graph.steps.values():
        outcome = folder.outcome(step)
        done = outcome is not None and outcome.status == "done"
        reason, seconds = (outcome.error if done else "", outcome.seconds) if outcome else ("", 0.0)
        state = State(BEFORE if done else WAITING, reason, seconds=seconds)
        if not done and step.hardware and step.hardware not in hardware:
            state = State(SKIPPED, f"is for {step.hardware}, which --hardware leaves out")
        elif not done and step.kind not in kinds:
            state = State(SKIPPED, f"is a {step.kind} step, which --steps leaves out")
        progress.states[step.key] = state
    return progress


def run(progress: Progress, executor: Executor, console: Console) -> None:
    """Do all steps that are not done yet; one that fails keeps only those from being done that need its result.

    Args:
        progress: of :func:`look`; tells in the end how each step ended.
        executor: carries them out.
        console: where progress goes.

    Raises:
        KeyboardInterrupt: interrupted; what is finished is kept, and what ran is waiting again.

    """
    submitted: set[str] = set()
    try:
        with _shown(progress, console) as show:
            while True:
                _submit_ready(progress, executor, submitted)
                for step in executor.running():
                    state = progress.states[step.key]
                    if state.status != RUNNING:
                        state.status, state.since = RUNNING, time.monotonic()
                        show(f"{step.name}: started")
                if not any(state.status in (WAITING, RUNNING) for state in progress.states.values()):
                    return
                for step, outcome in executor.ended(1.0):
                    state = progress.states[step.key]
                    state.status = DONE if outcome.status == "done" else FAILED
                    state.reason, state.seconds = outcome.error, outcome.seconds
                    end = f"done in {outcome.seconds:.0f} s" if state.status == DONE else "failed"
                    end += f": {outcome.error}" if outcome.error else ""
                    show(f"{step.name}: {end}")
                show("")
    finally:
        executor.close()
        for _, state in progress.of(RUNNING):
            state.status = WAITING


def _submit_ready(progress: Progress, executor: Executor, submitted: set[str]) -> None:
    for step in progress.graph.steps.values():
        state = progress.states[step.key]
        if state.status != WAITING or step.key in submitted:
            continue
        before = [progress.states[key] for key in step.after]
        broken = next((i for i, one in enumerate(before) if one.status in (FAILED, SKIPPED)), None)
        if broken is not None:
            needed = progress.graph.steps[step.after[broken]]
            state.status, state.reason = SKIPPED, f"needs {needed.name}, which {_why(before[broken])}"
        elif all(one.status in (DONE, BEFORE) for one in before):
            progress.folder.prepare(step)
            submitted.add(step.key)
            executor.submit(step)


def _why(state: State) -> str:
    return "failed" if state.status == FAILED else "was skipped"


@contextmanager
def _shown(progress: Progress, console: Console) -> Iterator[Callable[[str], None]]:
    """Show progress: a table that changes on a terminal, else a line for each event and every ten seconds."""
    if console.is_terminal:
        with Live(progress.table(), console=console, refresh_per_second=2, transient=True) as live:

            def update(event: str) -> None:
                if event and "failed" in event:
                    live.console.print(event, markup=False, highlight=False)
                live.update(progress.table())

            yield update
        return
    last = time.monotonic()

    def say(event: str) -> None:
        nonlocal last
        if event:
            print(event, file=sys.stderr, flush=True)
        elif time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(progress.line(), file=sys.stderr, flush=True)

    yield say
