"""Every setting of ``pareto loadtest``: its flags and its validated form."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtest.endpoint.client import is_http_url, normalize_base_url
from loadtest.request_settings import RequestSettings, request_settings, require
from loadtest.shapes.flags import add_shape_arguments, shaped_stage
from loadtest.stage_spec import DEFAULT_MAX_ERROR_RATE, GOALS, SearchSettings, StageSpec

# A minute and a bit: Prometheus scrapes once a minute where nothing else is said.
DEFAULT_LINGER_S = 65.0

DEFAULT_REQUESTS = 100
DEFAULT_SEARCH_DURATION_S = 20.0


@dataclass(frozen=True)
class Settings:
    """A whole ``pareto loadtest``."""

    base_url: str
    request: RequestSettings
    stages: tuple[StageSpec, ...]
    out: Path
    overwrite: bool
    label: str
    exporter_host: str
    exporter_port: int | None
    exporter_linger: float
    server_metrics: bool
    metrics_interval: float
    gpu_metrics: str | None
    ready_timeout: float
    max_error_rate: float | None
    search: SearchSettings | None
    stop_over_saturation: bool
    progress: bool
    processes: int
    flags: dict[str, Any]


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto loadtest`` that say where, how much and what to write."""
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="server (default: http://127.0.0.1:8000)"
    )
    group = parser.add_argument_group(
        "load: one stage for each value of --concurrency or --rate, or one of another shape"
    )
    group.add_argument("--concurrency", nargs="+", type=int, metavar="N", help="closed loop of N users (default: 1)")
    group.add_argument(
        "--rate", "--request-rate", nargs="+", type=float, metavar="R", help="open loop of R requests per second"
    )
    add_shape_arguments(group)
    group.add_argument(
        "--max-concurrency", type=int, metavar="N", help="open loop: hold back requests beyond N; waiting is latency"
    )
    group.add_argument(
        "--requests",
        "--num-prompts",
        type=int,
        metavar="N",
        help=f"measured requests of a stage (default: {DEFAULT_REQUESTS}, or no limit with --duration)",
    )
    group.add_argument("--duration", type=float, metavar="S", help="seconds in which requests of a stage may start")
    group.add_argument(
        "--warmup", "--num-warmups", type=int, default=0, metavar="N", help="requests before each stage, not measured"
    )
    group.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that send the load together, where one core is too slow for it (default: 1)",
    )
    group.add_argument(
        "--ready-timeout", type=float, default=0.0, metavar="S", help="seconds to wait for the server to answer"
    )
    group.add_argument(
        "--max-error-rate",
        type=float,
        metavar="F",
        help="stop, with status 1, when more than this fraction of a stage's requests fails (default: run to the end, "
        f"and status 1 above {DEFAULT_MAX_ERROR_RATE:g})",
    )
    group.add_argument(
        "--stop-over-saturation",
        action="store_true",
        help="open loop: end a stage as soon as the server's queue certainly grows without end (--find always does)",
    )
    group = parser.add_argument_group("search")
    group.add_argument(
        "--find",
        choices=GOALS,
        help="search the highest rate at which the server's queue does not grow (knee), or at which besides --goodput "
        "is met (max-rate); or measure at rates from one request at a time to all at once (sweep)",
    )
    group.add_argument(
        "--find-stages", type=int, default=8, metavar="N", help="stages at most; of a sweep all (default: 8)"
    )
    group.add_argument(
        "--find-tolerance",
        type=float,
        default=0.05,
        metavar="F",
        help="stop when the rate is known to this fraction (default: 0.05)",
    )
    group.add_argument(
        "--find-attainment",
        type=float,
        default=0.9,
        metavar="F",
        help="fraction of requests that must be good at a rate (default: 0.9)",
    )
    group.add_argument(
        "--find-users",
        type=int,
        default=256,
        metavar="N",
        help="users of the stage whose throughput is the first guess, or the end of the sweep (default: 256)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", default="loadtest-results", help="default: loadtest-results")
    group.add_argument("--overwrite", action="store_true", help="replace the results in DIR")
    group.add_argument("--label", default="", metavar="TEXT", help="name of this run in reports (default: the model)")
    group.add_argument("--exporter-port", type=int, metavar="PORT", help="serve Prometheus metrics while running")
    group.add_argument("--exporter-host", default="127.0.0.1", metavar="ADDR", help="default: 127.0.0.1 only")
    group.add_argument(
        "--exporter-linger",
        type=float,
        default=DEFAULT_LINGER_S,
        metavar="S",
        help="after the run keep serving them until Prometheus has the last values, for S seconds at most "
        f"(default: {DEFAULT_LINGER_S:g}; 0 closes at once)",
    )
    group.add_argument(
        "--server-metrics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sample the server's /metrics (default: on)",
    )
    group.add_argument(
        "--gpu-metrics",
        metavar="URL",
        help="page of a dcgm-exporter beside the server, such as http://node:9400: energy a token, power",
    )
    group.add_argument("--metrics-interval", type=float, default=1.0, metavar="S", help="between samples (default: 1)")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="progress bar (default: on)"
    )


def load_settings(args: argparse.Namespace) -> Settings:
    """Validate all flags of ``pareto loadtest``.

    Raises:
        LoadTestError: a value is no good, or two flags contradict each other.

    """
    port = args.exporter_port
    require(port is None or 0 < port < 65536, f"--exporter-port {port}: expected 1 to 65535")
    linger = args.exporter_linger
    require(0 <= linger < math.inf, f"--exporter-linger {linger:g}: expected seconds, 0 or more")
    rate = args.max_error_rate
    require(rate is None or 0 <= rate <= 1, f"--max-error-rate {rate}: expected a fraction from 0 to 1")
    require(args.metrics_interval > 0, f"--metrics-interval {args.metrics_interval:g}: must be above 0")
    require(args.processes >= 1, f"--processes {args.processes}: must be at least 1")
    require(
        args.processes == 1 or hasattr(os, "memfd_create"),
        f"--processes {args.processes}: needs Linux; elsewhere run Locust's workers (docs/loadtest.md)",
    )
    limit = args.max_concurrency
    require(
        limit is None or limit >= args.processes,
        f"--max-concurrency {limit}: is shared out to {args.processes} processes, so it must be at least as many",
    )
    search = _search(args)
    return Settings(
        base_url=normalize_base_url(args.base_url),
        request=request_settings(args),
        stages=_stages(args),
        out=Path(args.out),
        overwrite=args.overwrite,
        label=args.label,
        exporter_host=args.exporter_host,
        exporter_port=port,
        exporter_linger=linger,
        server_metrics=args.server_metrics,
        metrics_interval=args.metrics_interval,
        gpu_metrics=_page(args.gpu_metrics) if args.gpu_metrics else None,
        ready_timeout=args.ready_timeout,
        max_error_rate=args.max_error_rate,
        search=search,
        stop_over_saturation=args.stop_over_saturation,
        progress=args.progress,
        processes=args.processes,
        flags=public_flags(args),
    )


def _page(url: str) -> str:
    """Return the address of an exporter's page; without a path it is ``/metrics``."""
    require(
        is_http_url(url) and not urlsplit(url).username,
        f"--gpu-metrics {url}: expected an address such as http://node:9400/metrics",
    )
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path if parts.path not in ('', '/') else '/metrics'}"


def public_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags for the summary, without secrets: the API key, and the values of extra headers."""
    flags = {name: value for name, value in sorted(vars(args).items()) if name not in ("api_key", "config", "rest")}
    flags["header"] = [str(each).partition(":")[0] for each in flags.get("header") or []]
    return flags


def _search(args: argparse.Namespace) -> SearchSettings | None:
    if args.find is None:
        return None
    goal = f"--find {args.find}"
    for flag in ("rate", "concurrency", "ramp", "steps"):
        require(not vars(args)[flag], f"{goal} chooses the rates itself: leave out --{flag}")
    require(not args.requests, f"{goal} needs stages of equal time: give --duration in place of --requests")
    require(args.find != "max-rate" or bool(args.goodput), f"{goal} needs limits: --goodput ttft:500 tpot:50")
    require(args.find_stages >= 3, f"--find-stages {args.find_stages}: must be at least 3")
    require(0 < args.find_tolerance < 1, f"--find-tolerance {args.find_tolerance:g}: expected a fraction, 0 to 1")
    require(0 < args.find_attainment <= 1, f"--find-attainment {args.find_attainment:g}: expected a fraction, 0 to 1")
    require(args.find_users >= 1, f"--find-users {args.find_users}: must be at least 1")
    return SearchSettings(args.find, args.find_stages, args.find_tolerance, args.find_attainment, args.find_users)


def _stages(args: argparse.Namespace) -> tuple[StageSpec, ...]:
    require(
        not (args.concurrency and args.rate), "--concurrency (closed loop) and --rate (open loop) exclude each other"
    )
    shaped = shaped_stage(args, otherwise=bool(args.concurrency or args.rate or args.find))
    for name in ("requests", "max_concurrency"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: must be at least 1")
    require(args.warmup >= 0, f"--warmup {args.warmup}: must not be negative")
    require(args.duration is None or 0 < args.duration < math.inf, f"--duration {args.duration}: must be above 0")
    open_loop = bool(args.rate) or (shaped is not None and shaped.mode == "open")
    require(not (args.max_concurrency and not open_loop), "--max-concurrency needs --rate or another open loop")
    if shaped is not None:
        return (_limited(shaped, args),)
    requests = args.requests if args.requests or args.duration else DEFAULT_REQUESTS
    if args.find:
        # What all stages of a search share; it fills in the rates.
        return (
            StageSpec(
                arrival=args.arrival,
                burstiness=args.burstiness,
                warmup=args.warmup,
                duration_s=args.duration or DEFAULT_SEARCH_DURATION_S,
            ),
        )
    if args.rate:
        for rate in args.rate:
            require(0 < rate < math.inf, f"--rate {rate:g}: must be above 0")
        return tuple(
            StageSpec(
                index,
                rate=rate,
                arrival=args.arrival,
                burstiness=args.burstiness,
                max_concurrency=args.max_concurrency,
                warmup=args.warmup,
                requests=requests,
                duration_s=args.duration,
            )
            for index, rate in enumerate(args.rate)
        )
    for users in args.concurrency or [1]:
        require(users >= 1, f"--concurrency {users}: must be at least 1")
    return tuple(
        StageSpec(index, concurrency=users, warmup=args.warmup, requests=requests, duration_s=args.duration)
        for index, users in enumerate(args.concurrency or [1])
    )


def _limited(shaped: StageSpec, args: argparse.Namespace) -> StageSpec:
    """Return the one stage of a shape with the limits of the flags; the shape has a length of its own."""
    require(
        not (args.duration and shaped.shape == "steps"), "--duration and --steps exclude each other: steps have times"
    )
    return replace(
        shaped,
        arrival=args.arrival,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
        warmup=args.warmup,
        requests=args.requests,
        duration_s=args.duration or shaped.duration_s,
    )
