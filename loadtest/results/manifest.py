"""``run.json``: what a run was asked to do and how far it came, so that its records can be read without a summary.

It is written before the first request, and again as each stage begins and ends; so a run that was killed can be
summarized (:mod:`loadtest.results.offline`) and gone on with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loadtest.errors import LoadTestError
from loadtest.results.output import RUN
from loadtest.results.records import write_json_atomically
from loadtest.results.schema import Server
from loadtest.stage_spec import StageSpec

SCHEMA = "vllm-pareto/loadtest-run/1"
PARETO, LOCUST = "pareto loadtest", "locust"


@dataclass
class Manifest:
    """A run, as far as it has come.

    Attributes:
        label: its name in reports.
        started_at: ISO 8601, UTC.
        settings: every flag but secrets; a run that goes on takes its settings from here.
        environment: versions and machine of the load generator.
        server: the endpoint, as it was found.
        calibration: of prompt lengths.
        slo_ms: limits for goodput.
        planned: number of stages of the whole run.
        stages: those that were begun.
        finished: indices of those that ran to their end.
        driver: what began and ended the stages: ``pareto loadtest`` or ``locust``.
        schema: names this format.

    """

    label: str
    started_at: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    server: Server
    calibration: dict[str, Any]
    slo_ms: dict[str, float]
    planned: int
    stages: list[StageSpec] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    driver: str = PARETO
    schema: str = SCHEMA

    @property
    def unfinished(self) -> frozenset[int]:
        """Indices of the stages that were begun and did not end."""
        return frozenset(spec.index for spec in self.stages) - set(self.finished)

    @property
    def complete(self) -> bool:
        """Whether every planned stage ran to its end."""
        return len(self.finished) >= self.planned


_ADAPTER = TypeAdapter(Manifest)


class RunFile:
    """Keeps ``run.json`` in step with a run.

    Args:
        out: directory of the results.
        manifest: what is written; it is changed in place.

    """

    def __init__(self, out: Path, manifest: Manifest) -> None:
        self._path = out / RUN
        self.manifest = manifest
        self._write()

    def begin(self, spec: StageSpec) -> None:
        """Note that a stage begins."""
        stages = self.manifest.stages
        stages[:] = [*(each for each in stages if each.index != spec.index), spec]
        self._write()

    def finish(self, spec: StageSpec) -> None:
        """Note that it ran to its end."""
        if spec.index not in self.manifest.finished:
            self.manifest.finished.append(spec.index)
        self._write()

    def _write(self) -> None:
        write_json_atomically(self._path, _ADAPTER.dump_python(self.manifest, mode="json"))


def read_manifest(folder: Path) -> Manifest | None:
    """Return what ``run.json`` in ``folder`` says; None when there is none.

    Raises:
        LoadTestError: it is not one that a load test wrote.

    """
    path = folder / RUN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LoadTestError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise LoadTestError(f"{path}: expected the schema {SCHEMA}, as pareto loadtest writes it")
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise LoadTestError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
