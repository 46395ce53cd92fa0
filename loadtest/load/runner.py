"""Runs the stages of a load test on a Locust runner and writes the results."""

from __future__ import annotations

import datetime
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType

import gevent
from gevent.event import Event

from loadtest import clock
from loadtest.endpoint.client import Client
from loadtest.endpoint.descriptors import raise_limit
from loadtest.errors import LoadTestError
from loadtest.load.counts import Counts, SharedCounts
from loadtest.load.error_limit import ErrorLimit
from loadtest.load.local import LocalLoad
from loadtest.load.loop_lag import LoopLag
from loadtest.load.make_workload import make_workload, token_cost
from loadtest.load.monitor import StageMonitor
from loadtest.load.order import Order
from loadtest.load.pool import ProcessLoad
from loadtest.load.preflight import check_server
from loadtest.load.progress import Progress
from loadtest.load.resume import drop_unfinished
from loadtest.load.search import RateSearch
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.load.sweep import make_search
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
from loadtest.watching.gpu_metrics import GPUMetrics
from loadtest.watching.server_metrics import Sampler
from loadtest.watching.serving import Serving, await_last_scrape

OVER_SATURATED = (
    "over-saturated: the server's queue grew as long as requests came, so latencies depend on the stage's length; "
    "lower the rate"
)


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
        gpus = GPUMetrics(settings.gpu_metrics) if settings.gpu_metrics else None
        if gpus is not None:
            cleanup.callback(gpus.close)
        cost = token_cost(client, server, request)
        workload, calibration = make_workload(client, server, request, cost)
        settings = replace(settings, stages=tuple(fitted(spec, workload.times) for spec in settings.stages))
        stop = Event()
        counts = SharedCounts(settings.processes) if settings.processes > 1 else Counts()
        sink = Sink(counts=counts)
        load: LocalLoad | ProcessLoad
        if isinstance(counts, SharedCounts):
            order = Order((0, settings.processes), settings.base_url, request, server, cost, clock.anchor())
            load = ProcessLoad(order, counts, sink, exporter.observe_loop_lag, stop)
        else:
            load = LocalLoad(client, workload, sink, counts, LoopLag(exporter.observe_loop_lag))
        cleanup.callback(load.close)
        if resumed is None:
            prepare_output(settings.out, settings.overwrite)
        elif server.model != resumed.server.model:
            raise LoadTestError(f"--resume: the run asked {resumed.server.model}; this server has {server.model}")
        else:
            drop_unfinished(Folder(settings.out, resumed))
        writer = RecordWriter(settings.out / RECORDS, append=resumed is not None)
        cleanup.callback(writer.close)
        errors = ErrorLimit(settings.max_error_rate, stop, conversations=request.turns is not None)
        for listener in (writer.write, exporter.observe, errors.observe):
            sink.listen(listener)
        exporter.watch(lambda: sink.in_flight)
        sampler = _start_sampler(settings, client, gpus, cleanup, resumed is not None)
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
            counts.begin_stage()
            gate = partial(_enter, spec, sampler, load)
            stage = Stage(spec, request.seed, gate, make_shape(spec, workload.times), counts)
            progress.show(stage)
            monitor = StageMonitor(stage, sink, early=bool(search) or settings.stop_over_saturation)
            sink.listen(monitor.observe)
            load.run(stage, stop)
            monitor.stop()
            sink.forget(monitor.observe)
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
        duration, generator = clock.now() - began, load.health()
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
            status="interrupted"
            if interrupted.is_set()
            else "stopped"
            if errors.exceeded or load.error
            else "complete",
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
            error=load.error,
        )
        write_json_atomically(settings.out / SUMMARY, summary.to_dict())
        if serving is not None and not interrupted.is_set():
            await_last_scrape(serving, settings.exporter_linger, interrupted.wait)
        return summary


def _enter(spec: StageSpec, sampler: Sampler | None, load: LocalLoad | ProcessLoad) -> float:
    """Let the measured phase of a stage begin; returns when it does."""
    if sampler:
        sampler.enter(spec.index)
    return load.begin_measuring()


def _tell(search: RateSearch, spec: StageSpec, monitor: StageMonitor, slo_ms: dict[str, float]) -> None:
    """Tell the search how a stage of its went."""
    if spec.rate is None:
        search.guess(monitor.throughput())
    else:
        (result,) = summarize(monitor.kept, [spec], slo_ms)
        search.judge(
            spec.rate,
            search.met(result, monitor.rising),
            result.invalid is not None,
            search.attained(result, monitor.rising),
        )


def _start_sampler(
    settings: Settings, client: Client, gpus: GPUMetrics | None, cleanup: ExitStack, append: bool
) -> Sampler | None:
    if not settings.server_metrics and gpus is None:
        return None
    path, of_server = settings.out / SERVER_METRICS, client if settings.server_metrics else None
    sampler = Sampler(of_server, path, settings.metrics_interval, append=append, gpus=gpus)
    sampler.sample()
    if not sampler.found():
        sampler.stop()
        if not append:
            path.unlink()
        return None
    sampler.start()
    cleanup.callback(sampler.stop)
    return sampler
