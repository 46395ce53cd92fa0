"""One side of a comparison: the folder of a run, or a folder of repeated runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.errors import LoadTestError
from loadtest.results.console import load_name
from loadtest.results.offline import Folder, open_folder, summarize_folder
from loadtest.results.output import RECORDS
from loadtest.results.records import read_records
from loadtest.results.schema import StageResult, Summary
from loadtest.statistics.samples import SampleCollector, Samples
from loadtest.statistics.steady import steady_part

RUN_FOLDERS = "run-*"


@dataclass(frozen=True)
class Run:
    """A run with its samples by stage index."""

    path: Path
    summary: Summary
    samples: dict[int, Samples]


@dataclass(frozen=True)
class Side:
    """The runs of one side, at least one; all have the same stages."""

    path: Path
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The name of the first run."""
        return self.runs[0].summary.label

    @property
    def stages(self) -> list[StageResult]:
        """The stages of the first run."""
        return self.runs[0].summary.stages

    def samples(self, stage: int, steady: bool) -> list[Samples]:
        """Return the samples of a stage of every run.

        Raises:
            LoadTestError: ``steady`` and a run has no steady part.

        """
        found = []
        for run in self.runs:
            samples = run.samples[stage]
            if steady:
                part = steady_part(samples)
                if part is None:
                    raise LoadTestError(
                        f"--steady: {run.path}: stage {stage} has no steady part of half its requests and at least 20; "
                        "make it longer, or leave --steady out"
                    )
                samples = samples.part(part.first, part.last)
            found.append(samples)
        return found


def read_side(path: Path, flag: str) -> Side:
    """Read the folder of a run, or that of ``--repeat``.

    Raises:
        LoadTestError: there is no run in it, or its runs do not have the same stages.

    """
    folders = (
        [path] if (path / RECORDS).exists() else sorted(each.parent for each in path.glob(f"{RUN_FOLDERS}/{RECORDS}"))
    )
    runs = tuple(read_run(open_folder(each, flag)) for each in folders or [path])
    loads = [tuple(load_name(stage) for stage in run.summary.stages) for run in runs]
    for run, load in zip(runs, loads, strict=True):
        if load != loads[0]:
            raise LoadTestError(
                f"{flag} {path}: {run.path.name} has other stages ({', '.join(load)}) than {runs[0].path.name}"
            )
    return Side(path, runs)


def read_run(folder: Folder) -> Run:
    """Read one run."""
    summary = summarize_folder(folder)
    slo: dict[str, float] = folder.manifest.slo_ms if folder.manifest else {}
    if not slo:
        slo = next((stage.goodput.slo_ms for stage in summary.stages if stage.goodput), {})
    collectors = {stage.index: SampleCollector(slo) for stage in summary.stages}
    for record in read_records(folder.records):
        if record.stage in collectors:
            collectors[record.stage].add(record)
    return Run(folder.path, summary, {index: each.samples() for index, each in collectors.items()})


def same_stages(a: Side, b: Side) -> Sequence[tuple[StageResult, StageResult]]:
    """Return the stages that both sides have, by their load.

    Raises:
        LoadTestError: there is none.

    """
    of_b = {load_name(stage): stage for stage in b.stages}
    pairs = [(stage, of_b[load_name(stage)]) for stage in a.stages if load_name(stage) in of_b]
    if not pairs:
        loads = [", ".join(load_name(stage) for stage in side.stages) for side in (a, b)]
        raise LoadTestError(f"--compare: no load is in both: {a.path} has {loads[0]}, {b.path} has {loads[1]}")
    return pairs
