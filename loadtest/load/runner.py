"""Runs the stages of a load test on a Locust runner and writes the results."""

from __future__ import annotations

import datetime
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType

import gevent
from gevent.event import Event
from locust.env import Environment

from loadtest import clock
from loadtest.endpoint.client import Client
from loadtest.endpoint.descriptors import raise_limit
from loadtest.errors import LoadTestError
from loadtest.load.error_limit import ErrorLimit
from loadtest.load.loop_lag import LoopLag
from loadtest.load.make_workload import make_workload
from loadtest.load.monitor import StageMonitor
from loadtest.load.preflight import check_server
from loadtest.load.progress import Progress
from loadtest.load.resume import drop_unfinished
from loadtest.load.search import RateSearch
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.load.sweep import make_search
from loadtest.load.users import GenerationUser, Session
from loadtest.results.manifest import Manifest, RunFile
from loadtest.results.offline import Folder
from loadtest.results.output import RECORDS, SERVER_METRICS, SUMMARY, check_output, environment_info, prepare_output
from loadtest.results.records import RecordWriter, read_records, write_json_atomically
from loadtest.results.schema import Summary
from loadtest.results.server_samples import read_series
from loadtest.results.summary import summarize
from loadtest.settings import Settings
from loadtest.shapes.registry import fitted, make_shape
from loadtest.stage_spec import StageSpec
from loadtest.watching.exporter import Exporter
from loadtest.watching.server_metrics import Sampler
from loadtest.watching.serving import Serving, await_last_scrape

OVER_SATURATED = (
    "over-saturated: the server's queue grew as long as requests came, so latencies depend on the stage's length; "
    "lower the rate"
)


class RunUser(GenerationUser):
    """The user that ``pareto loadtest`` starts."""


@contextmanager
def _stop_on_signals(stop: Event) -> Iterator[Event]:
    """Yield an event that Ctrl-C or SIGTERM sets, beside ``stop``; a second signal acts as it does without us."""
    interrupted = Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        interrupted.set()
        stop.set()

    for number in before:
        signal.signal(number, handle)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_load_test(settings: Settings, resumed: Manifest | None = None) -> Summary:
    """Run every stage, and write the results to ``settings.out``.

    ``run.json`` is there from the start, ``records.jsonl`` and ``server_metrics.jsonl`` grow, and ``summary.json`` is
    last. ``resumed`` is the ``run.json`` of an unfinished run in the same folder: its stages that ended are kept.

    Interrupted by Ctrl-C or SIGTERM, it cancels what is in flight and returns a summary of what was measured, whose
    status is ``interrupted``. With ``--max-error-rate`` too many failures end it likewise, as ``stopped``.

    Raises:
        LoadTestError: the endpoint, a file or a port is no good; then nothing was measured.

    """
    if resumed is None:
        check_output(settings.out, settings.overwrite)
    raise_limit()
    # Ctrl-C before the first stage goes up to the caller; gevent need not print it as well.
    hub = gevent.get_hub()
    hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)
    with ExitStack() as cleanup:
        request = settings.request
        client = Client(settings.base_url, request.timeout, request.headers, request.insecure, request.ca_cert)
        cleanup.callback(client.close)
        server = check_server(client, request.model, settings.ready_timeout)
        label = settings.label or server.model
        exporter = Exporter(label, server.model, request.slo_ms)
        serving: Serving | None = None
        if settings.exporter_port is not None:
            serving = exporter.serve(settings.exporter_host, settings.exporter_port)
            cleanup.callback(serving.stop)
        workload, calibration = make_workload(client, server, request)
        settings = replace(settings, stages=tuple(fitted(spec, workload.times) for spec in settings.stages))
        if resumed is None:
            prepare_output(settings.out, settings.overwrite)
        elif server.model != resumed.server.model:
            raise LoadTestError(f"--resume: the run asked {resumed.server.model}; this server has {server.model}")
        else:
            drop_unfinished(Folder(settings.out, resumed))
        writer = RecordWriter(settings.out / RECORDS, append=resumed is not None)
        cleanup.callback(writer.close)
        stop = Event()
        errors = ErrorLimit(settings.max_error_rate, stop, conversations=request.turns is not None)
        sink = Sink(writer.write, exporter.observe, errors.observe)
        exporter.watch(lambda: sink.in_flight)
        sampler = _start_sampler(settings, client, cleanup, resumed is not None)

        # Locust warns about spawn rates and CPU on a log that nobody configured; the summary has better numbers.
        logging.getLogger("locust").setLevel(logging.ERROR)
        environment = Environment(user_classes=[RunUser], host=settings.base_url)
        environment.create_local_runner()
        cleanup.callback(environment.runner.quit)
        manifest = resumed or Manifest(
            label=label,
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            settings=settings.flags,
            environment=environment_info(),
            server=server,
            calibration=calibration,
            slo_ms=request.slo_ms,
            planned=settings.search.max_stages if settings.search else len(settings.stages),
        )
        run_file, began = RunFile(settings.out, manifest), clock.now()
        lag = LoopLag(exporter.observe_loop_lag)
        saturated: set[int] = set()
        search = make_search(settings.search, settings.stages[0]) if settings.search else None
        plan: Iterator[StageSpec] = iter(search.next_stage, None) if search else iter(settings.stages)
        interrupted = cleanup.enter_context(_stop_on_signals(stop))
        progress = cleanup.enter_context(Progress(settings.stages, sink, settings.progress))
        for spec in plan:
            if spec.index in manifest.finished:
                continue
            run_file.begin(spec)
            errors.begin_stage(spec)
            exporter.begin_stage(spec.index, spec.concurrency, spec.rate)
            entering = partial(sampler.enter, spec.index) if sampler else None
            stage = Stage(spec, request.seed, entering, make_shape(spec, workload.times))
            environment.loadtest_session = Session(environment, client, workload, stage, sink)
            progress.show(stage)
            monitor = StageMonitor(stage, sink, early=bool(search) or settings.stop_over_saturation)
            sink.listen(monitor.observe)
            _run_stage(environment, spec, stop)
            monitor.stop()
            sink.forget(monitor.observe)
            # The next stage, and the files of the results, need the descriptors of this one's connections.
            client.close_idle()
            if stop.is_set():
                break
            if monitor.saturated or (search and monitor.rising):
                saturated.add(spec.index)
            if search:
                _tell(search, spec, monitor, request.slo_ms)
            if sampler:
                sampler.leave()
            if search or not monitor.cut_short:
                run_file.finish(spec)
        duration, generator = clock.now() - began, lag.stop()
        stages = summarize(
            read_records(settings.out / RECORDS),
            manifest.stages,
            request.slo_ms,
            read_series(settings.out / SERVER_METRICS),
            manifest.unfinished,
        )
        for result in stages:
            if result.index in saturated:
                result.notes.append(OVER_SATURATED)
        summary = Summary(
            label=manifest.label,
            status="interrupted" if interrupted.is_set() else "stopped" if errors.exceeded else "complete",
            started_at=manifest.started_at,
            duration_s=duration,
            settings=settings.flags,
            environment=manifest.environment,
            server=server,
            calibration=calibration,
            stages=stages,
            generator=generator,
            files={"records": RECORDS, **({"server_metrics": SERVER_METRICS} if sampler else {})},
            search=search.result() if search else None,
        )
        write_json_atomically(settings.out / SUMMARY, summary.to_dict())
        if serving is not None and not interrupted.is_set():
            await_last_scrape(serving, settings.exporter_linger, interrupted.wait)
        return summary


def _tell(search: RateSearch, spec: StageSpec, monitor: StageMonitor, slo_ms: dict[str, float]) -> None:
    """Tell the search how a stage of its went."""
    if spec.rate is None:
        search.guess(monitor.throughput())
    else:
        (result,) = summarize(monitor.kept, [spec], slo_ms)
        search.judge(spec.rate, search.met(result, monitor.rising), result.invalid is not None)


def _start_sampler(settings: Settings, client: Client, cleanup: ExitStack, append: bool) -> Sampler | None:
    if not settings.server_metrics:
        return None
    path = settings.out / SERVER_METRICS
    sampler = Sampler(client, path, settings.metrics_interval, append=append)
    sampler.sample()
    if not sampler.found():
        sampler.stop()
        if not append:
            path.unlink()
        return None
    sampler.start()
    cleanup.callback(sampler.stop)
    return sampler


def _run_stage(environment: Environment, spec: StageSpec, stop: Event) -> None:
    """Start the stage's users and wait until all have ended by themselves, or until ``stop``."""
    runner = environment.runner
    users = spec.concurrency or 1
    runner.start(users, spawn_rate=users)

    def await_users() -> None:
        runner.spawning_greenlet.join()
        runner.user_greenlets.join()

    waiting = gevent.spawn(await_users)
    gevent.wait([waiting, stop], count=1)
    # Locust takes its time over stopping, and what is read from the sockets after that would look slow: so first this.
    runner.user_greenlets.kill()
    waiting.kill()
    runner.stop()
