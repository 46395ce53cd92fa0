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
from typing import Any

import gevent
from gevent.event import Event
from locust.env import Environment

from loadtest import clock
from loadtest.endpoint.client import Client
from loadtest.endpoint.descriptors import raise_limit
from loadtest.load.error_limit import ErrorLimit
from loadtest.load.loop_lag import LoopLag
from loadtest.load.monitor import StageMonitor
from loadtest.load.preflight import calibrate, check_server
from loadtest.load.progress import Progress
from loadtest.load.search import RateSearch
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.load.users import GenerationUser, Session
from loadtest.request_settings import RequestSettings
from loadtest.results.output import RECORDS, SERVER_METRICS, SUMMARY, check_output, environment_info, prepare_output
from loadtest.results.records import RecordWriter, read_records, write_json_atomically
from loadtest.results.schema import Server, Summary
from loadtest.results.summary import summarize
from loadtest.settings import Settings
from loadtest.shapes.registry import fitted, make_shape
from loadtest.stage_spec import StageSpec
from loadtest.watching.exporter import Exporter
from loadtest.watching.server_metrics import Sampler
from loadtest.workloads.prompts import FilePrompts, PromptSource, TokenIdPrompts, WordPrompts, read_prompts
from loadtest.workloads.workload import Workload

OVER_SATURATED = (
    "over-saturated: the server's queue grew as long as requests came, so latencies depend on the stage's length; "
    "lower the rate"
)


class RunUser(GenerationUser):
    """The user that ``pareto loadtest`` starts."""


def make_workload(client: Client, server: Server, settings: RequestSettings) -> tuple[Workload, dict[str, Any]]:
    """Return the workload, and how the lengths of its prompts were calibrated.

    Raises:
        LoadTestError: the prompt file is no good, or the server refuses the calibration.

    """
    source: PromptSource
    if settings.prompts:
        source = FilePrompts(read_prompts(settings.prompts, settings.chat))
        calibration: dict[str, Any] = {"how": "none: prompts from a file"}
    elif settings.prompt_token_ids:
        source = TokenIdPrompts(
            settings.prompt_tokens, settings.prefix_tokens, *settings.prompt_token_ids, settings.seed
        )
        calibration = {"how": "none: prompts are token ids"}
    else:
        cost = calibrate(client, server.model, settings.chat)
        source = WordPrompts(settings.prompt_tokens, settings.prefix_tokens, cost, settings.seed)
        calibration = {
            "how": cost.how,
            "tokens_per_word": cost.per_word,
            "overhead_tokens": cost.overhead,
            "words": len(cost.words),
        }
    ignore_eos = server.is_vllm if settings.ignore_eos is None else settings.ignore_eos
    workload = Workload(
        settings.chat,
        server.model,
        source,
        settings.output_tokens,
        ignore_eos,
        settings.temperature,
        settings.extra_body,
        settings.seed,
    )
    return workload, {**calibration, "ignore_eos": ignore_eos}


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


def run_load_test(settings: Settings) -> Summary:
    """Run every stage, and write ``records.jsonl``, ``server_metrics.jsonl`` and ``summary.json`` to ``settings.out``.

    Interrupted by Ctrl-C or SIGTERM, it cancels what is in flight and returns a summary of what was measured, whose
    status is ``interrupted``. With ``--max-error-rate`` too many failures end it likewise, as ``stopped``.

    Raises:
        LoadTestError: the endpoint, a file or a port is no good; then nothing was measured.

    """
    check_output(settings.out, settings.overwrite)
    raise_limit()
    # Ctrl-C before the first stage goes up to the caller; gevent need not print it as well.
    hub = gevent.get_hub()
    hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)
    with ExitStack() as cleanup:
        request = settings.request
        client = Client(settings.base_url, request.timeout, request.headers, request.insecure)
        cleanup.callback(client.close)
        server = check_server(client, request.model, settings.ready_timeout)
        exporter = Exporter()
        if settings.exporter_port is not None:
            cleanup.callback(exporter.serve(settings.exporter_host, settings.exporter_port))
        workload, calibration = make_workload(client, server, request)
        settings = replace(settings, stages=tuple(fitted(spec, workload.times) for spec in settings.stages))
        prepare_output(settings.out, settings.overwrite)
        writer = RecordWriter(settings.out / RECORDS)
        cleanup.callback(writer.close)
        stop = Event()
        errors = ErrorLimit(settings.max_error_rate, stop)
        sink = Sink(writer.write, exporter.observe, errors.observe)
        exporter.watch(lambda: sink.in_flight)
        sampler = _start_sampler(settings, client, cleanup)

        # Locust warns about spawn rates and CPU on a log that nobody configured; the summary has better numbers.
        logging.getLogger("locust").setLevel(logging.ERROR)
        environment = Environment(user_classes=[RunUser], host=settings.base_url)
        environment.create_local_runner()
        cleanup.callback(environment.runner.quit)
        started, began = datetime.datetime.now(datetime.UTC), clock.now()
        lag = LoopLag()
        finished: set[int] = set()
        saturated: set[int] = set()
        entered: list[StageSpec] = []
        search = RateSearch(settings.search, settings.stages[0]) if settings.search else None
        plan: Iterator[StageSpec] = iter(search.next_stage, None) if search else iter(settings.stages)
        interrupted = cleanup.enter_context(_stop_on_signals(stop))
        progress = cleanup.enter_context(Progress(settings.stages, sink, settings.progress))
        for spec in plan:
            entered.append(spec)
            errors.begin_stage(spec)
            exporter.begin_stage(spec.concurrency, spec.rate)
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
            if search or not monitor.cut_short:
                finished.add(spec.index)
            if search:
                _tell(search, spec, monitor, request.slo_ms)
            if sampler:
                sampler.leave()
        duration, generator = clock.now() - began, lag.stop()
        stages = summarize(
            read_records(settings.out / RECORDS),
            entered,
            request.slo_ms,
            {spec.index: sampler.series(spec.index) for spec in entered} if sampler else {},
            frozenset(spec.index for spec in entered) - finished,
        )
        for result in stages:
            if result.index in saturated:
                result.notes.append(OVER_SATURATED)
        summary = Summary(
            label=settings.label or server.model,
            status="interrupted" if interrupted.is_set() else "stopped" if errors.exceeded else "complete",
            started_at=started.isoformat(timespec="milliseconds"),
            duration_s=duration,
            settings=settings.flags,
            environment=environment_info(),
            server=server,
            calibration=calibration,
            stages=stages,
            generator=generator,
            files={"records": RECORDS, **({"server_metrics": SERVER_METRICS} if sampler else {})},
            search=search.result() if search else None,
        )
        write_json_atomically(settings.out / SUMMARY, summary.to_dict())
        return summary


def _tell(search: RateSearch, spec: StageSpec, monitor: StageMonitor, slo_ms: dict[str, float]) -> None:
    """Tell the search how a stage of its went."""
    if spec.rate is None:
        search.guess(monitor.throughput())
    else:
        (result,) = summarize(monitor.kept, [spec], slo_ms)
        search.judge(spec.rate, search.met(result, monitor.rising), result.invalid is not None)


def _start_sampler(settings: Settings, client: Client, cleanup: ExitStack) -> Sampler | None:
    if not settings.server_metrics:
        return None
    path = settings.out / SERVER_METRICS
    sampler = Sampler(client, path, settings.metrics_interval)
    sampler.sample()
    if not sampler.found():
        sampler.stop()
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
