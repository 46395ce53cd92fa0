"""What the prompts are: flags that ``pareto loadtest`` and the locustfile share, and their validated form."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.workloads.datasets import Columns
from loadtest.workloads.distributions import GRAMMAR, TokenDistribution, parse_distribution
from loadtest.workloads.made_up_images import Images, parse_images
from loadtest.workloads.prefixes import PrefixPool, parse_prefix_pool
from loadtest.workloads.prompt import BodyFormat
from loadtest.workloads.prompts import parse_token_id_range
from loadtest.workloads.traces.registry import FORMATS


@dataclass(frozen=True)
class WorkloadSettings:
    """What the prompts are; at most one of ``prompts``, ``trace`` and ``prompt_token_ids`` without ``trace`` is set."""

    prompt_tokens: TokenDistribution
    output_tokens: TokenDistribution
    prefixes: PrefixPool
    prompt_token_ids: tuple[int, int] | None
    prompts: str | None
    columns: Columns
    subset: str | None
    split: str
    trace: Path | None
    trace_format: str
    turns: TokenDistribution | None
    turn_tokens: TokenDistribution
    think_ms: TokenDistribution | None
    images: Images | None


def require(holds: bool, message: str) -> None:
    """Raise LoadTestError with ``message`` unless ``holds``."""
    if not holds:
        raise LoadTestError(message)


def add_workload_arguments(parser: Any) -> None:
    """Declare the flags; ``parser`` is argparse's or Locust's."""
    group = parser.add_argument_group("prompts: made up, from a data set (--prompts) or as long as a trace's (--trace)")
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
        "--prefix-pool",
        metavar="COUNT:TOKENS[:WEIGHT],...",
        help="each prompt begins with one of COUNT prefixes of TOKENS tokens, on top of --prompt-tokens",
    )
    group.add_argument(
        "--prompt-token-ids",
        metavar="[LOW:]HIGH",
        help="send random token ids below HIGH in place of words: exact lengths, completions and embeddings only",
    )
    group.add_argument(
        "--images",
        metavar="COUNT:WxH",
        help="made-up images in front of each prompt, as 1:512x512; chat and responses only",
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="data set: .txt (one prompt a line), .jsonl, .json, .csv, .tsv or .parquet, or hf:NAME from the Hugging "
        "Face Hub; rows have prompt or text, messages, or ShareGPT's conversations, and optionally max_tokens",
    )
    group.add_argument("--prompt-column", metavar="NAME", help="column of --prompts that holds the prompt")
    group.add_argument("--max-tokens-column", metavar="NAME", help="column that holds the output tokens to ask for")
    group.add_argument("--subset", metavar="NAME", help="of --prompts hf:NAME (default: its only one)")
    group.add_argument("--split", default="train", metavar="NAME", help="of --prompts hf:NAME (default: train)")
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="requests of a recorded trace, on its times and with its lengths and shared prefixes",
    )
    group.add_argument(
        "--trace-format", choices=("auto", *FORMATS), default="auto", help="default: known by its first row"
    )
    group.add_argument(
        "--turns",
        metavar="DIST",
        help="conversations of so many turns, each with all that was said before; of --prompts at most so many",
    )
    group.add_argument(
        "--turn-tokens", metavar="DIST", help="length of made-up turns after the first (default: --prompt-tokens)"
    )
    group.add_argument(
        "--think-time-ms", metavar="DIST", help="milliseconds from an answer to the next turn (default: none)"
    )


def workload_settings(args: argparse.Namespace, endpoint: BodyFormat) -> WorkloadSettings:
    """Validate the flags of :func:`add_workload_arguments`.

    Args:
        args: the flags.
        endpoint: what will be asked.

    Raises:
        LoadTestError: a value is no good, or two flags contradict each other.

    """
    ids = parse_token_id_range(args.prompt_token_ids) if args.prompt_token_ids else None
    require(not ids or endpoint.takes_token_ids, "--prompt-token-ids needs --endpoint completions")
    require(args.prefix_tokens >= 0, f"--prefix-tokens {args.prefix_tokens}: must not be negative")
    pool = parse_prefix_pool(args.prefix_pool) if args.prefix_pool else None
    for first, second in (
        ("--prompts", "--prompt-token-ids"),
        ("--prompts", "--prefix-tokens"),
        ("--prompts", "--prefix-pool"),
        ("--prompts", "--trace"),
        ("--trace", "--prefix-tokens"),
        ("--trace", "--prefix-pool"),
        ("--trace", "--turns"),
        ("--prefix-tokens", "--prefix-pool"),
        ("--images", "--prompts"),
        ("--images", "--trace"),
        ("--images", "--prompt-token-ids"),
        # What the server answers comes as text, whose ids nobody here knows.
        ("--turns", "--prompt-token-ids"),
    ):
        require(not (_given(args, first) and _given(args, second)), f"{first} and {second} exclude each other")
    for flag, needed in (
        ("--prompt-column", "--prompts"),
        ("--max-tokens-column", "--prompts"),
        ("--subset", "--prompts"),
        ("--turn-tokens", "--turns"),
        ("--think-time-ms", "--turns"),
    ):
        require(not _given(args, flag) or _given(args, needed), f"{flag} needs {needed}")
    require(not args.turns or endpoint.generates, f"--turns: --endpoint {endpoint.name} has no conversations")
    images = parse_images(args.images) if args.images else None
    require(images is None or endpoint.takes_messages, "--images needs --endpoint chat or responses")
    require(args.trace_format == "auto" or bool(args.trace), "--trace-format needs --trace")
    lengths = parse_distribution(args.prompt_tokens, "--prompt-tokens")
    return WorkloadSettings(
        prompt_tokens=lengths,
        output_tokens=parse_distribution(args.output_tokens, "--output-tokens"),
        prefixes=pool or PrefixPool((args.prefix_tokens,)),
        prompt_token_ids=ids,
        prompts=args.prompts or None,
        columns=Columns(args.prompt_column or None, args.max_tokens_column or None),
        subset=args.subset or None,
        split=args.split or "train",
        trace=Path(args.trace) if args.trace else None,
        trace_format=args.trace_format,
        turns=parse_distribution(args.turns, "--turns") if args.turns else None,
        turn_tokens=parse_distribution(args.turn_tokens, "--turn-tokens") if args.turn_tokens else lengths,
        think_ms=parse_distribution(args.think_time_ms, "--think-time-ms") if args.think_time_ms else None,
        images=images,
    )


def _given(args: argparse.Namespace, flag: str) -> bool:
    return bool(getattr(args, flag.removeprefix("--").replace("-", "_")))
