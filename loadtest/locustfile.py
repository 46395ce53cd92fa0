"""The load test under plain Locust: its web UI, headless mode, and distributed workers.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000
    locust -f loadtest/locustfile.py --host ... --headless -u 8 -r 8 -t 60s --out results/locust
    locust -f loadtest/locustfile.py --host ... --headless -u 2 -t 60s --request-rate 5     # 2 streams of 5/s
    locust -f loadtest/locustfile.py --master ...    and, in other shells,    locust -f loadtest/locustfile.py --worker

Without ``--request-rate`` Locust's users are a closed loop; with it, each user is a stream of Poisson arrivals at that
rate. ``loadtest/shapes.py`` adds load shapes. See docs/loadtest.md.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
from locust import events
from locust.runners import MasterRunner, WorkerRunner

from loadtest.endpoint.client import Client, normalize_base_url
from loadtest.endpoint.descriptors import raise_limit
from loadtest.errors import LoadTestError
from loadtest.load.distributed import RecordCollector, RecordForwarder, drain
from loadtest.load.locust_report import LocustReport
from loadtest.load.make_workload import make_workload
from loadtest.load.preflight import check_server
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage, Ticket
from loadtest.load.users import GenerationUser, Session
from loadtest.request_settings import add_request_arguments, fresh_seed, request_settings, require
from loadtest.results.records import Record
from loadtest.settings import DEFAULT_LINGER_S
from loadtest.stage_spec import ARRIVALS, StageSpec
from loadtest.watching.exporter import Exporter
from loadtest.watching.serving import Serving, await_last_scrape

logger = logging.getLogger(__name__)
_NOT_IN_WEB_UI = (
    *("--api-key", "--header", "--insecure", "--ca-cert", "--out", "--overwrite"),
    *("--exporter-port", "--exporter-host", "--exporter-linger"),
)


class TextGenerationUser(GenerationUser):
    """Asks the endpoint for text, as the command line says."""


class EndlessStage(Stage):
    """A stage without end, as Locust decides when to stop; requests of its first seconds are warm-up."""

    def __init__(self, spec: StageSpec, seed: int, warmup_s: float) -> None:
        super().__init__(spec, seed)
        self._warmup_s = warmup_s

    def take(self) -> Ticket | None:
        """Return the next request."""
        ticket = super().take()
        return replace(ticket, warmup=self._warming()) if ticket else None

    def arrivals(self, warmup: bool, stream_id: int = 0) -> Any:
        """Yield the arrivals of one stream."""
        for offset, ticket in super().arrivals(warmup, stream_id):
            yield offset, replace(ticket, warmup=self._warming())

    def _warming(self) -> bool:
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
    ui.add_argument("--request-rate", default="", metavar="R", help="open loop: requests per second of each user")
    ui.add_argument("--arrival", choices=ARRIVALS, default="poisson", help="open loop (default: poisson)")
    ui.add_argument("--burstiness", type=float, default=1.0, help="of poisson arrivals: below 1 bursts")
    ui.add_argument("--warmup-s", type=float, default=0.0, metavar="S", help="seconds of warm-up, left out of --out")
    ui.add_argument("--out", default="", metavar="DIR", help="write records.jsonl and summary.json there")
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
        self.stage_spec()
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
            self.forwarder = RecordForwarder(runner)
            return
        if isinstance(runner, MasterRunner):
            self.collector = RecordCollector(runner, self._record)
        if self.options.out:
            self.report = LocustReport(environment, Path(self.options.out), self.options.overwrite)
        if self.options.exporter_port:
            self.serving = self.exporter.serve(self.options.exporter_host, self.options.exporter_port)
            self.exporter.watch(lambda: self.sink.in_flight)

    def stage_spec(self) -> StageSpec:
        """Return the stage that the options ask for."""
        text = str(self.options.request_rate or "").strip()
        try:
            rate = float(text) if text else None
        except ValueError:
            rate = math.nan
        require(rate is None or 0 < rate < math.inf, f"--request-rate {text}: must be a number above 0")
        burstiness = float(self.options.burstiness)
        require(0 < burstiness < math.inf, f"--burstiness {burstiness:g}: must be above 0")
        return StageSpec(0, rate=rate, arrival=self.options.arrival, burstiness=burstiness)

    def start(self) -> None:
        """Prepare this process's users for a test that begins."""
        spec = self.stage_spec()
        runner = self.environment.runner
        self._tests += 1
        # A test started again from the web UI must not find its prompts in the server's prefix cache. Workers take the
        # seed from the master, so that all share one prefix.
        if self._tests > 1 and self.options.seed == self._drawn_seed and not isinstance(runner, WorkerRunner):
            self.options.seed = self._drawn_seed = fresh_seed()
        settings = request_settings(self.options)
        logger.info("seed: %d (--seed %d sends the same requests again)", settings.seed, settings.seed)
        if self.report:
            self.report.begin(spec, settings.slo_ms, self.options)
        if isinstance(runner, MasterRunner):
            self._show(self.options.model or "", settings.slo_ms, spec)
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
        if self.report:
            self.report.describe(server, calibration)
        self.environment.loadtest_session = Session(
            self.environment,
            self.client,
            workload,
            EndlessStage(spec, settings.seed, float(self.options.warmup_s)),
            self.sink,
            stream_id=runner.worker_index,
        )

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
                # Ctrl-C ends the wait, and gevent need not print it as an error.
                hub = gevent.get_hub()
                hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)
                with contextlib.suppress(KeyboardInterrupt):
                    await_last_scrape(self.serving, float(self.options.exporter_linger), gevent.sleep)
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
            environment.process_exit_code = 2
            # The event is fired from within the start of the runner, which must be over before it can be stopped.
            runner, headless = environment.runner, environment.parsed_options.headless
            gevent.spawn_later(0.1, runner.quit if headless else runner.stop)

    environment.events.test_start.add_listener(on_test_start)
    environment.events.test_stopping.add_listener(lambda **_: test.stopping())
    environment.events.test_stop.add_listener(lambda **_: test.stop())
    environment.events.quit.add_listener(lambda **_: test.quit())
