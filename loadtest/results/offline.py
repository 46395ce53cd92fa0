"""The summary of a run from what lies in its folder, for runs that were killed before they wrote one."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from loadtest.errors import LoadTestError
from loadtest.results.manifest import Manifest, read_manifest
from loadtest.results.output import RECORDS, SERVER_METRICS, SUMMARY, environment_info
from loadtest.results.records import CANCELLED, Record, read_records
from loadtest.results.schema import Generator, Server, Summary
from loadtest.results.server_samples import read_series
from loadtest.results.summary import summarize
from loadtest.stage_spec import StageSpec


@dataclass(frozen=True)
class Folder:
    """A run's folder that has records.

    Attributes:
        path: of the folder.
        manifest: its ``run.json``; None for records without one, of an older version.

    """

    path: Path
    manifest: Manifest | None

    @property
    def records(self) -> Path:
        """The file of its records."""
        return self.path / RECORDS


def open_folder(path: Path, flag: str) -> Folder:
    """Return the folder of a run.

    Args:
        path: the folder.
        flag: what errors start with.

    Raises:
        LoadTestError: there is no such folder, or it has no records.

    """
    if not path.is_dir():
        raise LoadTestError(f"{flag} {path}: no such folder; give the --out of a load test")
    if not (path / RECORDS).is_file():
        raise LoadTestError(f"{flag} {path}: no {RECORDS} in it; give the --out of a load test")
    return Folder(path, read_manifest(path))


def stage_specs(folder: Folder) -> list[StageSpec]:
    """Return what the stages of a run were asked to do.

    Where nothing says what the load was, for want of ``run.json`` or because Locust's users came and went, a stage is
    taken for a closed loop of as many users as there were requests in flight at once.
    """
    if folder.manifest is None:
        return [StageSpec(index, concurrency=users) for index, users in sorted(_peaks(folder.records).items())]
    specs = sorted(folder.manifest.stages, key=lambda spec: spec.index)
    if all(spec.mode == "open" or spec.concurrency for spec in specs):
        return specs
    peaks = _peaks(folder.records)
    return [
        spec if spec.mode == "open" or spec.concurrency else replace(spec, concurrency=peaks.get(spec.index, 1))
        for spec in specs
    ]


def _peaks(path: Path) -> dict[int, int]:
    """Return the most requests that were in flight at once, by stage."""
    events: dict[int, list[tuple[float, int]]] = {}
    for record in read_records(path):
        if not record.warmup and record.outcome != CANCELLED:
            begin = record.intended_unix_s + (record.start_s or 0.0)
            ends = (record.intended_unix_s + record.end_s, -1)
            events.setdefault(record.stage, []).extend([(begin, 1), ends])
    peaks = {}
    for index, changes in events.items():
        in_flight = peak = 0
        for _, change in sorted(changes):
            in_flight += change
            peak = max(peak, in_flight)
        peaks[index] = max(peak, 1)
    return peaks


def stored_summary(path: Path) -> Summary | None:
    """Return the ``summary.json`` of a folder; None when there is none.

    Raises:
        LoadTestError: it is not one that a load test wrote.

    """
    file = path / SUMMARY
    if not file.exists():
        return None
    try:
        return TypeAdapter(Summary).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise LoadTestError(f"{file} is not a summary of pareto loadtest: {str(error).splitlines()[0]}") from error


def summarize_folder(folder: Folder) -> Summary:
    """Return the summary of a run, computed anew from its records.

    A run whose ``run.json`` lacks stages, or that left none, is ``interrupted`` where it wrote no summary that says
    otherwise. The lag of the load generator is known of runs with a summary only.

    Raises:
        LoadTestError: there are no records, or the files are damaged beyond a torn last line.

    """
    manifest, stored = folder.manifest, stored_summary(folder.path)
    if manifest is None and stored is not None:
        known = {stage.index: stage for stage in stored.stages}
        specs = [
            StageSpec(
                index, concurrency=stage.concurrency, rate=stage.rate, arrival=stage.arrival or "poisson",
                burstiness=stage.burstiness or 1.0, max_concurrency=stage.max_concurrency,
            )
            for index, stage in known.items()
        ]  # fmt: skip
        unfinished = frozenset(index for index, stage in known.items() if not stage.finished)
        slo = next((dict(stage.goodput.slo_ms) for stage in stored.stages if stage.goodput), {})
    else:
        specs, unfinished = stage_specs(folder), manifest.unfinished if manifest else frozenset()
        slo = manifest.slo_ms if manifest else {}
    first, last = _span(folder.records)
    if first is None:
        raise LoadTestError(f"{folder.records}: no request ended in it, so there is nothing to summarize")
    complete = manifest.complete if manifest else False
    samples = folder.path / SERVER_METRICS
    return Summary(
        label=manifest.label if manifest else stored.label if stored else folder.path.name,
        status=stored.status if stored else "complete" if complete else "interrupted",
        started_at=manifest.started_at if manifest else stored.started_at if stored else _iso(first),
        duration_s=stored.duration_s if stored else last - first,
        settings=manifest.settings if manifest else stored.settings if stored else {},
        environment=manifest.environment if manifest else stored.environment if stored else environment_info(),
        server=manifest.server if manifest else stored.server if stored else Server("", "", [], None, False, {}),
        calibration=manifest.calibration if manifest else stored.calibration if stored else {"how": "unknown"},
        stages=summarize(read_records(folder.records), specs, slo, read_series(samples), unfinished),
        generator=stored.generator if stored else Generator(None, None),
        files={"records": RECORDS, **({"server_metrics": SERVER_METRICS} if samples.exists() else {})},
        search=stored.search if stored else None,
        error=stored.error if stored else None,
    )


def _span(path: Path) -> tuple[float | None, float]:
    """Return the first intended start and the last end of the records, in Unix time."""
    first: float | None = None
    last = 0.0
    for record in read_records(path):
        first = record.intended_unix_s if first is None else min(first, record.intended_unix_s)
        last = max(last, _end(record))
    return first, last


def _end(record: Record) -> float:
    return record.intended_unix_s + record.end_s


def _iso(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).isoformat(timespec="milliseconds")
