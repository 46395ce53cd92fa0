"""``--out`` of the locustfile: the files that ``pareto loadtest`` writes, for a test that Locust starts and stops."""

from __future__ import annotations

import argparse
import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest import clock
from loadtest.results.output import RECORDS, SUMMARY, environment_info, prepare_output
from loadtest.results.records import Record, RecordWriter, read_records, write_json_atomically
from loadtest.results.schema import Generator, Server, Summary
from loadtest.results.summary import distribution, summarize
from loadtest.settings import public_flags
from loadtest.stage_spec import StageSpec


class LocustReport:
    """Writes ``records.jsonl`` while a test runs and ``summary.json`` when it stops.

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
        self._writer = RecordWriter(self._dir / RECORDS)

    def describe(self, spec: StageSpec, server: Server, calibration: dict[str, Any]) -> None:
        """Add what is known of the stage and the server to the summary."""
        self._spec, self._server, self._calibration = spec, server, calibration

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
        spec = self._spec
        if spec.mode == "closed":
            spec = replace(spec, concurrency=self._peak_users)
        elif spec.rate is not None and self._stream_per_user:
            spec = replace(spec, rate=spec.rate * max(1, self._peak_users))
        summary = Summary(
            label=self._options.label or self._server.model or "locust",
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
