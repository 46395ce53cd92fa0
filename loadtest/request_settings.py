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

from loadtest.endpoint.client import PATHS
from loadtest.errors import LoadTestError
from loadtest.workloads.distributions import GRAMMAR, TokenDistribution, parse_distribution
from loadtest.workloads.prompts import parse_token_id_range

SLO_NAMES = ("ttft", "tpot", "e2el")


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
