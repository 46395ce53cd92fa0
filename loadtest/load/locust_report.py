"""``--out`` of the locustfile: the files that ``pareto loadtest`` writes, for a test that Locust starts and stops."""

from __future__ import annotations

import argparse
import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest import clock
from loadtest.results.manifest import LOCUST, Manifest, RunFile
from loadtest.results.output import RECORDS, SUMMARY, environment_info, prepare_output
from loadtest.results.percentiles import distribution
from loadtest.results.records import Record, RecordWriter, read_records, write_json_atomically
from loadtest.results.schema import Generator, Server, Summary
from loadtest.results.summary import summarize
from loadtest.settings import public_flags
from loadtest.stage_spec import StageSpec


class LocustReport:
    """Writes ``run.json`` and ``records.jsonl`` while a test runs and ``summary.json`` when it stops.

    A second test of the same process (from the web UI) goes to ``DIR-2``, and so on.

    Args:
        environment: Locust's.
        out: directory to write to.
        overwrite: whether results there may be replaced.

    Raises:
        LoadTestError: they may not, or the directory cannot be written.

    """

    def __init__(self, environment: Any, out: Path, overwrite: bool) -> None:
        prepare_output(out, overwrite)
        self._environment = environment
        self._out, self._overwrite = out, overwrite
        self._tests = 0
        self._lags: list[float] = []
        self._dir = out
        self._writer: RecordWriter | None = None
        self._server = Server(environment.host or "", "", [], None, False, {})
        self._calibration: dict[str, Any] = {"how": "on the workers"}
        self._run_file: RunFile | None = None

    def begin(
        self, spec: StageSpec, slo_ms: dict[str, float], options: argparse.Namespace, stream_per_user: bool
    ) -> None:
        """Open the files of a test, and close those of the one before.

        Args:
            spec: what the test does; of a closed loop the number of users is seen while it runs.
            slo_ms: limits for goodput.
            options: the flags.
            stream_per_user: whether each user is a stream at the rate of ``spec``.

        """
        self.close()
        self._tests += 1
        if self._tests > 1:
            self._dir = self._out.with_name(f"{self._out.name}-{self._tests}")
            prepare_output(self._dir, self._overwrite)
        self._spec, self._slo, self._options = spec, slo_ms, options
        self._stream_per_user, self._lags = stream_per_user, []
        self._server = Server(self._environment.host or "", options.model or "", [], None, False, {})
        self._started, self._began = datetime.datetime.now(datetime.UTC), clock.now()
        self._peak_users, self._duration_s = 0, 0.0
        self._calibration = {"how": "on the workers"}
        manifest = Manifest(
            label=self._label(),
            started_at=self._started.isoformat(timespec="milliseconds"),
            settings=public_flags(options),
            environment=environment_info(),
            server=self._server,
            calibration=self._calibration,
            slo_ms=slo_ms,
            planned=1,
            driver=LOCUST,
        )
        self._run_file = RunFile(self._dir, manifest)
        self._run_file.begin(self._present_spec())
        self._writer = RecordWriter(self._dir / RECORDS)

    def describe(self, spec: StageSpec, server: Server, calibration: dict[str, Any]) -> None:
        """Add what is known of the stage and the server to the summary."""
        self._spec, self._server, self._calibration = spec, server, calibration
        if self._run_file is not None:
            manifest = self._run_file.manifest
            manifest.label, manifest.server, manifest.calibration = self._label(), server, calibration
            self._run_file.begin(self._present_spec())

    def note_users(self, count: int) -> None:
        """Take the number of users, when Locust has started as many as it was to."""
        self._peak_users = max(self._peak_users, count)
        # A stream for each of them makes the rate. How many a closed loop had, its records say.
        if self._writer is not None and self._run_file is not None and self._stream_per_user:
            self._run_file.begin(self._present_spec())

    def write(self, record: Record) -> None:
        """Append one record, unless no test is open."""
        if self._writer is not None:
            self._peak_users = max(self._peak_users, self._environment.runner.user_count)
            self._writer.write(record)

    def add_lags(self, lags: list[float]) -> None:
        """Take the late times of an event loop that sends requests, in ms."""
        self._lags += lags

    def close(self) -> None:
        """Close the records; later ones are dropped."""
        if self._writer is not None:
            self.summarize()
            self._writer.close()
            self._writer = None

    def summarize(self) -> None:
        """Write the summary of the records so far; does nothing when no test was begun.

        The file stays open: a master that quits hears its workers' last records only after its own test has stopped.
        """
        if self._writer is None:
            return
        self._duration_s = self._duration_s or clock.now() - self._began
        spec = self._present_spec()
        summary = Summary(
            label=self._label(),
            status="complete",
            started_at=self._started.isoformat(timespec="milliseconds"),
            duration_s=self._duration_s,
            settings=public_flags(self._options),
            environment=environment_info(),
            server=self._server,
            calibration=self._calibration,
            stages=summarize(read_records(self._dir / RECORDS), [spec], self._slo),
            generator=Generator(distribution(self._lags), self._environment.runner.current_cpu_usage),
            files={"records": RECORDS},
        )
        write_json_atomically(self._dir / SUMMARY, summary.to_dict())
        if self._run_file is not None:
            self._run_file.begin(spec)
            self._run_file.finish(spec)

    def _label(self) -> str:
        return str(self._options.label or self._server.model or "locust")

    def _present_spec(self) -> StageSpec:
        """Return what the test does, with the users that it has had so far."""
        spec = self._spec
        if spec.mode == "closed":
            return replace(spec, concurrency=self._peak_users or spec.concurrency)
        if spec.rate is not None and self._stream_per_user:
            return replace(spec, rate=spec.rate * max(1, self._peak_users))
        return spec
