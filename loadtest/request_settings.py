"""What is asked of the server: flags that ``pareto loadtest`` and the locustfile share, and their validated form."""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.endpoint.apis.registry import APIS
from loadtest.endpoint.client import ssl_context
from loadtest.errors import LoadTestError
from loadtest.workload_settings import WorkloadSettings, add_workload_arguments, require, workload_settings

SLO_NAMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class RequestSettings(WorkloadSettings):
    """What is asked of the server, and how."""

    endpoint: str
    model: str | None
    ignore_eos: bool | None
    temperature: float | None
    extra_body: dict[str, Any]
    seed: int
    timeout: float
    headers: dict[str, str]
    insecure: bool
    ca_cert: Path | None
    tokenizer: Path | None
    slo_ms: dict[str, float]


def add_request_arguments(parser: Any) -> None:
    """Declare the flags that say what is asked; ``parser`` is argparse's or Locust's."""
    add_workload_arguments(parser)
    group = parser.add_argument_group("requests")
    group.add_argument("--model", metavar="NAME", help="served model to ask for (default: the first one served)")
    group.add_argument("--endpoint", choices=tuple(APIS), default="completions", help="API (default: completions)")
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json or a model's folder: counts tokens where the server does not, and recorded answers",
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
    group.add_argument("--ca-cert", metavar="FILE", help="certificates (PEM) to trust beside those of the system")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="SLO of a good request: any of ttft, tpot, e2el with a limit in ms",
    )


def fresh_seed() -> int:
    """Return a seed that no other run has: with the same prompts again, the server's prefix cache would answer."""
    return secrets.randbelow(2**31)


def request_settings(args: argparse.Namespace) -> RequestSettings:
    """Validate the flags of :func:`add_request_arguments`, and draw a seed into ``args.seed`` where none was given.

    The drawn one is written back so that the summary, and with Locust every worker, has the one that was used.

    Raises:
        LoadTestError: a value is no good, or two flags contradict each other.

    """
    args.seed = fresh_seed() if args.seed is None else args.seed
    require(args.seed >= 0, f"--seed {args.seed}: must not be negative")
    require(0 < args.timeout < math.inf, f"--timeout {args.timeout:g}: must be above 0")
    ca_cert = Path(args.ca_cert) if args.ca_cert else None
    require(not (ca_cert and args.insecure), "--ca-cert and --insecure exclude each other")
    if ca_cert:
        ssl_context(False, ca_cert)
    try:
        extra = json.loads(args.extra_body or "{}")
    except ValueError as error:
        raise LoadTestError(f"--extra-body is not JSON: {error}") from error
    require(isinstance(extra, dict), "--extra-body must be a JSON object")
    goodput = args.goodput.split() if isinstance(args.goodput, str) else args.goodput
    return RequestSettings(
        **vars(workload_settings(args, APIS[args.endpoint])),
        endpoint=args.endpoint,
        model=args.model or None,
        ignore_eos=args.ignore_eos,
        temperature=args.temperature if args.temperature >= 0 else None,
        extra_body=extra,
        seed=args.seed,
        timeout=args.timeout,
        headers=_headers(args.header, args.api_key or os.environ.get("OPENAI_API_KEY", "")),
        insecure=args.insecure,
        ca_cert=ca_cert,
        tokenizer=Path(args.tokenizer) if args.tokenizer else None,
        slo_ms=_slo(goodput),
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
