"""What the user sees while the load runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

import gevent
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.results.console import load_name
from loadtest.stage_spec import StageSpec

# Drawing shares the core with the requests being timed, so it happens rarely.
_REDRAW_S = 0.5
# Without a terminal a log gets a line this often, so that a hang is seen.
_LINE_S = 10.0


class Progress:
    """A progress bar on standard error, for the present stage; a line every 10 seconds where that is no terminal.

    Args:
        stages: all of them, for the count.
        sink: knows the requests in flight and finished.
        enabled: ``--progress``.

    """

    def __init__(self, stages: Sequence[StageSpec], sink: Sink, enabled: bool) -> None:
        self._count = len(stages)
        self._sink = sink
        self._stage: Stage | None = None
        self._enabled = enabled
        self._greenlet: gevent.Greenlet | None = None
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[counts]}", markup=False),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr, markup=False, emoji=False),
            auto_refresh=False,
            transient=True,
            disable=not enabled or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=1.0, counts="")

    def __enter__(self) -> Progress:
        self._bar.start()
        self._greenlet = gevent.spawn(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._greenlet is not None:
            self._greenlet.kill()
        self._bar.stop()

    def show(self, stage: Stage) -> None:
        """Turn to another stage."""
        self._stage = stage
        self._draw()

    def _run(self) -> None:
        while True:
            gevent.sleep(_LINE_S if self._bar.disable else _REDRAW_S)
            if self._bar.disable and self._enabled:
                self._print_line()
            self._draw()

    def _print_line(self) -> None:
        if self._stage is not None:
            description, counts = self._words(self._stage)
            print(f"{description}: {self._stage.progress():.0%}, {counts}", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        stage = self._stage
        if stage is None or self._bar.disable:
            return
        description, counts = self._words(stage)
        self._bar.update(
            self._task,
            description=description,
            completed=stage.progress(),
            counts=counts,
        )
        self._bar.refresh()

    def _words(self, stage: Stage) -> tuple[str, str]:
        sink = self._sink
        phase = "warm-up" if stage.spec.warmup and stage.measured_from is None else load_name(stage.spec)
        counts = f"{sink.ok} ok, {sink.failed} failed, {sink.in_flight} in flight"
        # A search does not know how many stages it will take.
        count = max(self._count, stage.spec.index + 1)
        return f"stage {stage.spec.index + 1}/{count}: {phase}", counts
