"""Every setting of a load test: its flags, shared by ``pareto loadtest`` and the locustfile, and its validated form."""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.endpoint.client import PATHS, normalize_base_url
from loadtest.errors import LoadTestError
from loadtest.load.arrivals import ARRIVALS
from loadtest.load.error_limit import DEFAULT_MAX_ERROR_RATE
from loadtest.load.stage import StageSpec
from loadtest.workloads.distributions import GRAMMAR, TokenDistribution, parse_distribution
from loadtest.workloads.prompts import parse_token_id_range

SLO_NAMES = ("ttft", "tpot", "e2el")
DEFAULT_REQUESTS = 100


@dataclass(frozen=True)
class RequestSettings:
    """What is asked of the server, and how."""

    endpoint: str
    model: str | None
    prompt_tokens: TokenDistribution
    output_tokens: TokenDistribution
    prefix_tokens: int
    prompt_token_ids: tuple[int, int] | None
    prompts: Path | None
    ignore_eos: bool | None
    temperature: float | None
    extra_body: dict[str, Any]
    seed: int
    timeout: float
    headers: dict[str, str]
    insecure: bool
    slo_ms: dict[str, float]

    @property
    def chat(self) -> bool:
        """Whether the chat endpoint is asked."""
        return self.endpoint == "chat"


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
    server_metrics: bool
    metrics_interval: float
    ready_timeout: float
    max_error_rate: float | None
    progress: bool
    flags: dict[str, Any]


def add_request_arguments(parser: Any) -> None:
    """Declare the flags that say what is asked; ``parser`` is argparse's or Locust's."""
    group = parser.add_argument_group("requests")
    group.add_argument("--model", metavar="NAME", help="served model to ask for (default: the first one served)")
    group.add_argument("--endpoint", choices=tuple(PATHS), default="completions", help="API (default: completions)")
    group.add_argument(
        "--prompt-tokens", default="128", metavar="DIST", help=f"prompt length in tokens (default: 128): {GRAMMAR}"
    )
    group.add_argument(
        "--output-tokens", default="64", metavar="DIST", help="max_tokens, the same grammar (default: 64)"
    )
    group.add_argument(
        "--prefix-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens that all prompts share in front, on top of --prompt-tokens (default: 0)",
    )
    group.add_argument(
        "--prompt-token-ids",
        metavar="[LOW:]HIGH",
        help="send random token ids below HIGH in place of words: exact lengths, completions only",
    )
    group.add_argument(
        "--prompts", metavar="FILE", help="prompts from a .txt (one a line) or .jsonl (prompt or messages; max_tokens)"
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="generate exactly the drawn length (default: on where the server is vLLM)",
    )
    group.add_argument("--temperature", type=float, default=0.0, help="default: 0; negative leaves it to the server")
    group.add_argument("--extra-body", metavar="JSON", default="{}", help="object merged into every request's body")
    group.add_argument("--seed", type=int, metavar="N", help="of lengths, prompts and arrivals (default: a new one)")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take (600)")
    group.add_argument("--api-key", default="", metavar="KEY", help="bearer token (default: $OPENAI_API_KEY)")
    group.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'", help="extra header")
    group.add_argument("--insecure", action="store_true", help="do not verify the server's certificate")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="SLO of a good request: any of ttft, tpot, e2el with a limit in ms",
    )


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto loadtest`` that say where, how much and what to write."""
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="server (default: http://127.0.0.1:8000)"
    )
    group = parser.add_argument_group("load: one stage for each value of --concurrency or --rate")
    group.add_argument("--concurrency", nargs="+", type=int, metavar="N", help="closed loop of N users (default: 1)")
    group.add_argument(
        "--rate", "--request-rate", nargs="+", type=float, metavar="R", help="open loop of R requests per second"
    )
    group.add_argument("--arrival", choices=ARRIVALS, default="poisson", help="open loop (default: poisson)")
    group.add_argument(
        "--burstiness", type=float, default=1.0, help="of poisson arrivals: below 1 bursts, above 1 is regular"
    )
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
        "--ready-timeout", type=float, default=0.0, metavar="S", help="seconds to wait for the server to answer"
    )
    group.add_argument(
        "--max-error-rate",
        type=float,
        metavar="F",
        help="stop, with status 1, when more than this fraction of a stage's requests fails (default: run to the end, "
        f"and status 1 above {DEFAULT_MAX_ERROR_RATE:g})",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", default="loadtest-results", help="default: loadtest-results")
    group.add_argument("--overwrite", action="store_true", help="replace the results in DIR")
    group.add_argument("--label", default="", metavar="TEXT", help="name of this run in reports (default: the model)")
    group.add_argument("--exporter-port", type=int, metavar="PORT", help="serve Prometheus metrics while running")
    group.add_argument("--exporter-host", default="127.0.0.1", metavar="ADDR", help="default: 127.0.0.1 only")
    group.add_argument(
        "--server-metrics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sample the server's /metrics (default: on)",
    )
    group.add_argument("--metrics-interval", type=float, default=1.0, metavar="S", help="between samples (default: 1)")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="progress bar (default: on)"
    )


def require(holds: bool, message: str) -> None:
    """Raise LoadTestError with ``message`` unless ``holds``."""
    if not holds:
        raise LoadTestError(message)


def fresh_seed() -> int:
    """Return a seed that no other run has: with the same prompts again, the server's prefix cache would answer."""
    return secrets.randbelow(2**31)


def request_settings(args: argparse.Namespace) -> RequestSettings:
    """Validate the flags of :func:`add_request_arguments`, and draw a seed into ``args.seed`` where none was given.

    The drawn one is written back so that the summary, and with Locust every worker, has the one that was used.

    Raises:
        LoadTestError: a value is no good, or two flags contradict each other.

    """
    require(args.prefix_tokens >= 0, f"--prefix-tokens {args.prefix_tokens}: must not be negative")
    args.seed = fresh_seed() if args.seed is None else args.seed
    require(args.seed >= 0, f"--seed {args.seed}: must not be negative")
    require(0 < args.timeout < math.inf, f"--timeout {args.timeout:g}: must be above 0")
    ids = parse_token_id_range(args.prompt_token_ids) if args.prompt_token_ids else None
    require(not (ids and args.endpoint == "chat"), "--prompt-token-ids needs --endpoint completions")
    require(not (ids and args.prompts), "--prompts and --prompt-token-ids exclude each other")
    require(not (args.prefix_tokens and args.prompts), "--prompts and --prefix-tokens exclude each other")
    try:
        extra = json.loads(args.extra_body or "{}")
    except ValueError as error:
        raise LoadTestError(f"--extra-body is not JSON: {error}") from error
    require(isinstance(extra, dict), "--extra-body must be a JSON object")
    goodput = args.goodput.split() if isinstance(args.goodput, str) else args.goodput
    return RequestSettings(
        endpoint=args.endpoint,
        model=args.model or None,
        prompt_tokens=parse_distribution(args.prompt_tokens, "--prompt-tokens"),
        output_tokens=parse_distribution(args.output_tokens, "--output-tokens"),
        prefix_tokens=args.prefix_tokens,
        prompt_token_ids=ids,
        prompts=Path(args.prompts) if args.prompts else None,
        ignore_eos=args.ignore_eos,
        temperature=args.temperature if args.temperature >= 0 else None,
        extra_body=extra,
        seed=args.seed,
        timeout=args.timeout,
        headers=_headers(args.header, args.api_key or os.environ.get("OPENAI_API_KEY", "")),
        insecure=args.insecure,
        slo_ms=_slo(goodput),
    )


def load_settings(args: argparse.Namespace) -> Settings:
    """Validate all flags of ``pareto loadtest``.

    Raises:
        LoadTestError: a value is no good, or two flags contradict each other.

    """
    port = args.exporter_port
    require(port is None or 0 < port < 65536, f"--exporter-port {port}: expected 1 to 65535")
    rate = args.max_error_rate
    require(rate is None or 0 <= rate <= 1, f"--max-error-rate {rate}: expected a fraction from 0 to 1")
    require(args.metrics_interval > 0, f"--metrics-interval {args.metrics_interval:g}: must be above 0")
    return Settings(
        base_url=normalize_base_url(args.base_url),
        request=request_settings(args),
        stages=_stages(args),
        out=Path(args.out),
        overwrite=args.overwrite,
        label=args.label,
        exporter_host=args.exporter_host,
        exporter_port=port,
        server_metrics=args.server_metrics,
        metrics_interval=args.metrics_interval,
        ready_timeout=args.ready_timeout,
        max_error_rate=args.max_error_rate,
        progress=args.progress,
        flags=public_flags(args),
    )


def public_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags for the summary, without secrets: the API key, and the values of extra headers."""
    flags = {name: value for name, value in sorted(vars(args).items()) if name not in ("api_key", "config", "rest")}
    flags["header"] = [str(each).partition(":")[0] for each in flags.get("header") or []]
    return flags


def _stages(args: argparse.Namespace) -> tuple[StageSpec, ...]:
    require(
        not (args.concurrency and args.rate), "--concurrency (closed loop) and --rate (open loop) exclude each other"
    )
    for name in ("requests", "max_concurrency"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: must be at least 1")
    require(args.warmup >= 0, f"--warmup {args.warmup}: must not be negative")
    require(args.duration is None or 0 < args.duration < math.inf, f"--duration {args.duration}: must be above 0")
    require(0 < args.burstiness < math.inf, f"--burstiness {args.burstiness:g}: must be above 0")
    require(
        not (args.max_concurrency and not args.rate), "--max-concurrency needs --rate; a closed loop has --concurrency"
    )
    requests = args.requests if args.requests or args.duration else DEFAULT_REQUESTS
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


def _headers(lines: list[str], api_key: str) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    for line in lines:
        name, colon, value = line.partition(":")
        require(bool(colon and name.strip()), f"--header {line}: expected 'NAME: VALUE'")
        headers[name.strip()] = value.strip()
    for name, value in headers.items():
        flag = "--api-key" if name == "Authorization" and api_key else f"--header {name}"
        require((name + value).isascii() and (name + value).isprintable(), f"{flag}: printable ASCII only")
    return headers


def _slo(words: list[str]) -> dict[str, float]:
    slo = {}
    for word in words:
        name, _, text = word.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        require(
            name in SLO_NAMES and 0 < limit < math.inf,
            f"--goodput {word}: expected NAME:MS with NAME one of {', '.join(SLO_NAMES)}",
        )
        slo[name] = limit
    return slo
