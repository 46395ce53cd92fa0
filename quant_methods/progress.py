"""Progress where there is no terminal to draw a bar on: a line every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

EVERY = 10.0
"""Seconds between two lines."""


class Lines:
    """Says how far a run is, every EVERY seconds for as long as the context is open, also while a step takes long."""

    def __init__(
        self, name: str, say: Callable[[str], object], every: float = EVERY, *, milestones: bool = False
    ) -> None:
        """Start with nothing to report.

        Args:
            name: what runs; every line starts with it.
            say: takes a line; called from a thread of its own.
            every: seconds between two lines.
            milestones: say a line also when the first block is done, and each further tenth of the blocks, so that
                a log of a short run shows how it went.

        """
        self.name, self.say, self.every, self.milestones = name, say, every, milestones
        self._done = 0
        self._started = time.monotonic()
        # What happens now, and when that step began; None: the lines count from the start of the run.
        self._now: tuple[str, float | None] = "starting", None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Lines:
        """Start saying lines."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop saying lines."""
        self._over.set()
        self._thread.join()

    def show(self, done: int, total: int, what: str) -> None:
        """Note how far the run is; has the shape of ``compress``'s progress.

        Args:
            done: blocks finished, or steps.
            total: blocks in all, or steps.
            what: what happens now.

        """
        # While a model learns, steps are what is counted.
        steps = ", step " in what
        self.note(what if steps or what.startswith("block") else f"{what} ({done} of {total} blocks done)")
        before, self._done = self._done, done
        if self.milestones and total and done > before and (before == 0 or done * 10 // total > before * 10 // total):
            unit = "steps" if steps else "blocks"
            self.say(f"{self.name}: {done} of {total} {unit} done, {self.seconds:.0f} s")

    def note(self, what: str) -> None:
        """Note what happens now; lines go on giving the seconds since the start."""
        self._now = what, None

    def begin(self, what: str) -> None:
        """Note the step that begins, whose own seconds the lines then give."""
        self._now = what, time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._started

    def _run(self) -> None:
        while not self._over.wait(self.every):
            what, began = self._now
            lasted = f"{self.seconds:.0f} s" if began is None else f"for {time.monotonic() - began:.0f} s"
            self.say(f"{self.name}: {what}, {lasted}")
