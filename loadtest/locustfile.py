"""The load test under plain Locust: its web UI, headless mode, and distributed workers.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000
    locust -f loadtest/locustfile.py --host ... --headless -u 8 -r 8 -t 60s --out results/locust
    locust -f loadtest/locustfile.py --host ... --headless -t 60s --rate 20                 # over all workers
    locust -f loadtest/locustfile.py --host ... --headless --steps 4:30 16:30 --out results/steps
    locust -f loadtest/locustfile.py --master ...    and, in other shells,    locust -f loadtest/locustfile.py --worker

Locust's users are a closed loop. ``--rate``, ``--ramp``, ``--steps`` and ``--trace`` are those of ``pareto loadtest``,
shared by all workers; with ``--request-rate`` each user is a stream of arrivals at that rate. See docs/loadtest.md.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust import events
from locust.runners import MasterRunner, WorkerRunner

from loadtest.endpoint.client import Client, normalize_base_url
from loadtest.endpoint.descriptors import raise_limit
from loadtest.errors import LoadTestError
from loadtest.load import locust_shape
from loadtest.load.distributed import DRAIN_S, RecordCollector, RecordForwarder, drain
from loadtest.load.error_limit import ErrorLimit
from loadtest.load.locust_options import LocustLoad, add_load_arguments, locust_load, max_error_rate
from loadtest.load.locust_report import LocustReport
from loadtest.load.loop_lag import LoopLag
from loadtest.load.make_workload import make_workload
from loadtest.load.preflight import check_server
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage, Ticket
from loadtest.load.users import GenerationUser, Session
from loadtest.request_settings import add_request_arguments, fresh_seed, request_settings, require
from loadtest.results.records import Record
from loadtest.settings import DEFAULT_LINGER_S
from loadtest.shapes.registry import fitted, make_shape
from loadtest.shapes.shape import Hold, Shape
from loadtest.stage_spec import StageSpec
from loadtest.watching.exporter import Exporter
from loadtest.watching.serving import Serving, await_last_scrape

logger = logging.getLogger(__name__)
_BAD_INPUT = 2
_NOT_IN_WEB_UI = (
    *("--api-key", "--header", "--insecure", "--ca-cert", "--out", "--overwrite"),
    *("--exporter-port", "--exporter-host", "--exporter-linger"),
)


class TextGenerationUser(GenerationUser):
    """Asks the endpoint for text, as the command line says."""


class EndlessStage(Stage):
    """A stage without end, as Locust decides when to stop; requests of its first seconds are warm-up."""

    def __init__(self, spec: StageSpec, seed: int, warmup_s: float, shape: Shape) -> None:
        super().__init__(spec, seed, shape=shape)
        self._warmup_s = warmup_s

    def take(self, user: int = 0) -> Ticket | None:
        """Return the next request."""
        ticket = super().take(user)
        return replace(ticket, warmup=self._in_warmup()) if ticket else None

    def arrivals(
        self, warmup: bool, stream_id: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[float, Ticket]]:
        """Yield the arrivals of one stream, or a part of it."""
        begun = self.elapsed()
        for offset, ticket in super().arrivals(warmup, stream_id, part):
            yield offset, replace(ticket, warmup=begun + offset < self._warmup_s)

    def _in_warmup(self) -> bool:
        return self.elapsed() < self._warmup_s


class _WebUIArguments:
    """Takes add_argument calls for Locust's parser, and keeps secrets and local paths out of its web UI."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def add_argument_group(self, title: str) -> _WebUIArguments:
        return self

    def add_argument(self, *flags: str, **options: Any) -> None:
        self._parser.add_argument(*flags, include_in_web_ui=flags[0] not in _NOT_IN_WEB_UI, **options)


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    """Add the load test's flags to Locust's."""
    # Locust would listen on every address; here nothing does unless asked to.
    parser.set_defaults(web_host="127.0.0.1", master_bind_host="127.0.0.1")
    ui = _WebUIArguments(parser)
    add_request_arguments(ui)
    add_load_arguments(ui)
    ui.add_argument("--warmup-s", type=float, default=0.0, metavar="S", help="seconds of warm-up, left out of --out")
    ui.add_argument("--out", default="", metavar="DIR", help="write run.json, records.jsonl and summary.json there")
    ui.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    ui.add_argument("--label", default="", metavar="TEXT", help="name of the run in reports")
    ui.add_argument("--exporter-port", type=int, default=0, metavar="PORT", help="Prometheus metrics; 0 is off")
    ui.add_argument("--exporter-host", default="127.0.0.1", metavar="ADDR", help="default: 127.0.0.1 only")
    ui.add_argument(
        "--exporter-linger",
        type=float,
        default=DEFAULT_LINGER_S,
        metavar="S",
        help=f"wait for Prometheus' last scrape at the end of a headless test (default: {DEFAULT_LINGER_S:g})",
    )


class LocustTest:
    """What hangs on Locust's events in one process: a standalone one, the master, or a worker."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.options: argparse.Namespace = environment.parsed_options
        load = self.load()
        self.errors = self._watch_errors()
        self.lag: LoopLag | None = None
        given = self.options.seed
        request_settings(self.options)
        self._drawn_seed: int | None = self.options.seed if given is None else None
        self._tests = 0
        self.exporter = Exporter()
        self.serving: Serving | None = None
        self.report: LocustReport | None = None
        self.sink = Sink(self._record)
        self.client: Client | None = None
        self.forwarder: RecordForwarder | None = None
        self.collector: RecordCollector | None = None
        runner = environment.runner
        if isinstance(runner, WorkerRunner):
            self.forwarder = RecordForwarder(runner, self._lags)
            return
        self.shape: locust_shape.DriverShape | None = None
        if load.shaped:
            self.shape = environment.shape_class = locust_shape.DriverShape(runner, self._closed_shape)
            # Users that a shape takes away finish their request.
            environment.stop_timeout = environment.stop_timeout or DRAIN_S
        if isinstance(runner, MasterRunner):
            self.collector = RecordCollector(runner, self._record, self._add_lags)
        if self.options.out:
            self.report = report = LocustReport(environment, Path(self.options.out), self.options.overwrite)
            environment.events.spawning_complete.add_listener(lambda user_count, **_: report.note_users(user_count))
        if self.options.exporter_port:
            self.serving = self.exporter.serve(self.options.exporter_host, self.options.exporter_port)
            self.exporter.watch(lambda: self.sink.in_flight)

    def load(self) -> LocustLoad:
        """Return the load that the options ask for."""
        return locust_load(self.options)

    def _closed_shape(self) -> tuple[Shape | None, float]:
        spec = self.load().spec
        return (make_shape(spec) if spec.mode == "closed" else None), spec.duration_s or math.inf

    def _watch_errors(self) -> ErrorLimit:
        """Return what stops the test when too many requests fail."""
        stop = Event()

        def leave() -> None:
            while stop.wait():
                stop.clear()
                logger.error("more than --max-error-rate %s of the requests failed", self.options.max_error_rate)
                runner = self.environment.runner
                (runner.quit if self.options.headless else runner.stop)()

        limit = max_error_rate(self.options)
        if limit is not None and not isinstance(self.environment.runner, WorkerRunner):
            gevent.spawn(leave)
        return ErrorLimit(limit, stop)

    def _lags(self) -> list[float]:
        return self.lag.take() if self.lag else []

    def _add_lags(self, lags: list[float]) -> None:
        if self.report:
            self.report.add_lags(lags)

    def _part(self, load: LocustLoad) -> tuple[int, int] | None:
        """Return which part of one stream this process sends; None when each user is a stream of its own.

        Raises:
            LoadTestError: it joined when the others had begun.

        """
        runner = self.environment.runner
        if not load.shaped:
            return None
        if not isinstance(runner, WorkerRunner):
            return 0, 1
        workers: list[str] = self.options.loadtest_workers
        require(runner.client_id in workers, "this worker joined after the test began; it takes part in the next one")
        return workers.index(runner.client_id), len(workers)

    def start(self) -> None:
        """Prepare this process's users for a test that begins."""
        load = self.load()
        spec = load.spec
        runner = self.environment.runner
        self._tests += 1
        # A test started again from the web UI must not find its prompts in the server's prefix cache. Workers take the
        # seed from the master, so that all share one prefix.
        if self._tests > 1 and self.options.seed == self._drawn_seed and not isinstance(runner, WorkerRunner):
            self.options.seed = self._drawn_seed = fresh_seed()
        settings = request_settings(self.options)
        logger.info("seed: %d (--seed %d sends the same requests again)", settings.seed, settings.seed)
        if self.report:
            self.report.begin(spec, settings.slo_ms, self.options, load.stream_per_user)
        self.errors.begin_stage(spec)
        if isinstance(runner, MasterRunner):
            self._show(self.options.model or "", settings.slo_ms, spec)
            if self.shape:
                # The options travel to the workers when they are told to begin.
                self.options.loadtest_workers = self.shape.workers()
                self.shape.begin()
            return
        require(bool(self.environment.host), "give the server's address with --host http://HOST:PORT")
        self.client = Client(
            normalize_base_url(self.environment.host),
            settings.timeout,
            settings.headers,
            settings.insecure,
            settings.ca_cert,
        )
        raise_limit()
        server = check_server(self.client, settings.model, 0.0)
        self._show(server.model, settings.slo_ms, spec)
        workload, calibration = make_workload(self.client, server, settings)
        # Of a closed loop Locust starts and stops the users.
        shape: Shape = Hold(math.inf)
        if spec.mode == "open":
            spec, shape = fitted(spec, workload.times), make_shape(spec, workload.times)
        else:
            spec = replace(spec, duration_s=None)
        if self.report:
            self.report.describe(spec if spec.mode == "open" else load.spec, server, calibration)
        self.lag = LoopLag()
        self.environment.loadtest_session = Session(
            self.environment,
            self.client,
            workload,
            EndlessStage(spec, settings.seed, float(self.options.warmup_s), shape),
            self.sink,
            stream_id=runner.worker_index,
            part=self._part(load),
        )
        if not self.forwarder and self.shape:
            self.shape.begin()

    def stopping(self) -> None:
        """Await what is in flight, before Locust cancels it."""
        if self.collector:
            self.collector.finish()
        elif not self.forwarder:
            drain(self.environment.runner)

    def stop(self) -> None:
        """Finish a test: pass the last records on, or write the summary."""
        if self.forwarder:
            self.forwarder.flush()
        else:
            self._add_lags(self._lags())
            if self.shape:
                self.shape.end()
            if max_error_rate(self.options) is not None and self.environment.process_exit_code != _BAD_INPUT:
                self.environment.process_exit_code = int(self.errors.over())
        if self.lag:
            self.lag.stop()
            self.lag = None
        if self.report:
            self.report.summarize()
        if self.client:
            self.client.close()

    def quit(self) -> None:
        """Close the files when the process ends, and wait for the exporter's last scrape."""
        if self.report:
            self.report.close()
        if self.serving:
            if self.options.headless:
                # Ctrl-C ends the wait. As an exception it would be lost where it meets the exporter's own greenlet.
                told = Event()
                watcher = gevent.signal_handler(signal.SIGINT, told.set)
                await_last_scrape(self.serving, float(self.options.exporter_linger), told.wait)
                watcher.cancel()
            self.serving.stop()
            self.serving = None

    def _show(self, model: str, slo_ms: dict[str, float], spec: StageSpec) -> None:
        """Begin a run of the exporter's."""
        self.exporter.begin_run(self.options.label or model, model, slo_ms)
        self.exporter.begin_stage(spec.index, None, spec.rate)

    def _record(self, record: Record) -> None:
        if self.forwarder:
            self.forwarder.add(record)
            return
        self.errors.observe(record)
        self.exporter.observe(record)
        if self.report:
            self.report.write(record)


@events.init.add_listener
def on_init(environment: Any, **_: Any) -> None:
    """Hang the load test on Locust's events, or leave with one line when the flags are no good."""
    if environment.parsed_options is None:
        return
    try:
        test = LocustTest(environment)
    except LoadTestError as error:
        print(f"locustfile: error: {error}", file=sys.stderr)
        sys.exit(2)

    def on_test_start(**_: Any) -> None:
        try:
            test.start()
        except LoadTestError as error:
            logger.error("cannot start: %s", error)
            environment.loadtest_session = None
            environment.process_exit_code = _BAD_INPUT
            # The event is fired from within the start of the runner, which must be over before it can be stopped.
            runner, headless = environment.runner, environment.parsed_options.headless
            gevent.spawn_later(0.1, runner.quit if headless else runner.stop)

    environment.events.test_start.add_listener(on_test_start)
    environment.events.test_stopping.add_listener(lambda **_: test.stopping())
    environment.events.test_stop.add_listener(lambda **_: test.stop())
    environment.events.quit.add_listener(lambda **_: test.quit())
