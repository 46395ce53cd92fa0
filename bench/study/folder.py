"""The output folder of studies: one folder a step, named by its key, and one a plan with its page.

OUT/steps/KEY/step.json    what the step does, and what determines its result
OUT/steps/KEY/out/         its result
OUT/steps/KEY/log.txt      what its commands printed
OUT/steps/KEY/done.json    that it is done or failed, how long it took, and where
OUT/plans/NAME/            the page, study.json and the pack
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.files import read_json, write_json
from bench.study.step import SCHEMA, Step
from kv_cache.errors import ParetoError

RECORD, RESULT, LOG, DONE, LOCK = "step.json", "out", "log.txt", "done.json", "lock"


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        status: ``done`` or ``failed``.
        error: one line why it failed, or why some of what it measures side by side did; empty if nothing did.
        started_at: ISO 8601, UTC.
        seconds: that it took, of all attempts together.
        environment: versions and machine.

    """

    status: str
    error: str
    started_at: str
    seconds: float
    environment: dict[str, Any] = field(default_factory=dict)


class Folder:
    """The output folder.

    Args:
        out: its path; several plans may share it.

    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.steps = out / "steps"

    def of(self, key: str) -> Path:
        """Return a step's folder."""
        return self.steps / key

    def result(self, key: str) -> Path:
        """Return the folder of a step's result."""
        return self.steps / key / RESULT

    def plan(self, name: str) -> Path:
        """Return the folder of a plan's page."""
        return self.out / "plans" / name

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other studies out of this folder.

        Raises:
            ParetoError: another one is in it.

        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = (self.out / LOCK).open("a")
        except OSError as error:
            raise ParetoError(f"{self.out}: cannot be written ({error.strerror or error})") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ParetoError(
                    f"{self.out} is in use by another study; wait for it, or give another --out"
                ) from None
            yield

    def done(self) -> Iterator[tuple[Step, Outcome]]:
        """Yield all steps that were ever done here, by their keys' order, with their outcomes."""
        for path in sorted(self.steps.glob(f"*/{DONE}")) if self.steps.is_dir() else []:
            try:
                step, outcome = self.read(path.parent.name), self.recorded(path.parent.name)
            except ParetoError:
                continue
            if outcome is not None and outcome.status == "done":
                yield step, outcome

    def measured_with(self) -> dict[str, dict[str, str]]:
        """Return the versions that the newest finished step of each kind was done with, here or not; "" of any kind."""
        newest: dict[str, tuple[str, dict[str, str]]] = {}
        for step, outcome in self.done():
            found = (outcome.started_at, outcome.environment.get("versions") or {})
            for kind in ("", step.kind):
                newest[kind] = max(newest.get(kind, found), found, key=lambda one: one[0])
        return {kind: found for kind, (_, found) in newest.items()}

    def prepare(self, step: Step) -> None:
        """Write what a step is to do, for the process that does it."""
        write_json(self.of(step.key) / RECORD, step.to_dict())

    def read(self, key: str) -> Step:
        """Return the step of a folder.

        Raises:
            ParetoError: there is none.

        """
        found = read_json(self.of(key) / RECORD)
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            raise ParetoError(f"{self.of(key) / RECORD}: not a step of a study")
        tuples = {name: tuple(found[name]) for name in ("words", "serve", "after")}
        return Step(**found | tuples)

    def outcome(self, step: Step) -> Outcome | None:
        """Return how a step ended; None if it did not, or its result is gone."""
        found = self.recorded(step.key)
        if found is None or (found.status == "done" and not (self.result(step.key) / step.result).is_file()):
            return None
        return found

    def recorded(self, key: str) -> Outcome | None:
        """Return what a step's folder says of how it ended."""
        found = read_json(self.of(key) / DONE)
        try:
            return Outcome(**found)
        except TypeError:
            return None

    def finish(self, key: str, outcome: Outcome) -> None:
        """Write how a step ended."""
        write_json(self.of(key) / DONE, asdict(outcome))

    def last_line(self, key: str) -> str:
        """Return the last line of a step's log."""
        try:
            with (self.of(key) / LOG).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 2000))
                text = file.read().decode(errors="replace").replace("\r", "\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
