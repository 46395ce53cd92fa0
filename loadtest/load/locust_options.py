"""How much load a test under Locust is to make, from its flags or the form of its web UI."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

from locust.util.timespan import parse_timespan

from loadtest.request_settings import require
from loadtest.shapes.flags import add_shape_arguments, shaped_stage
from loadtest.stage_spec import StageSpec


@dataclass(frozen=True)
class LocustLoad:
    """The load of a test.

    Attributes:
        spec: its stage; of a closed loop Locust sets the number of users.
        stream_per_user: whether each user is a stream of arrivals at the rate of ``spec``.
        shaped: whether a shape drives Locust, in place of its ``--users`` and ``--run-time``.

    """

    spec: StageSpec
    stream_per_user: bool
    shaped: bool


def add_load_arguments(parser: Any) -> None:
    """Declare the flags on Locust's parser."""
    parser.add_argument(
        "--rate", default="", metavar="R", help="open loop: requests per second of all workers together"
    )
    parser.add_argument("--request-rate", default="", metavar="R", help="open loop: requests per second of each user")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="of an open loop, in all; 0 is no limit")
    add_shape_arguments(parser)
    parser.add_argument(
        "--max-error-rate",
        default="",
        metavar="F",
        help="stop, with status 1, when more than this fraction of the requests fails",
    )


def locust_load(options: argparse.Namespace) -> LocustLoad:
    """Return what the options ask for.

    Raises:
        LoadTestError: a value is no good, or two flags contradict each other.

    """
    total, each = (_number(options, name) for name in ("rate", "request_rate"))
    require(total is None or each is None, "--rate (of all) and --request-rate (of each user) exclude each other")
    shaped = shaped_stage(options, otherwise=bool(total or each))
    require(options.requests >= 0, f"--requests {options.requests}: must not be negative")
    spec = shaped or StageSpec(rate=each if total is None else total)
    driven = shaped is not None or total is not None
    require(
        not options.requests or (driven and spec.mode == "open"), "--requests needs --rate or another open loop's shape"
    )
    seconds = [each for each in (spec.duration_s, _seconds(options.run_time)) if each is not None]
    spec = replace(
        spec,
        arrival=options.arrival,
        burstiness=float(options.burstiness),
        requests=options.requests or None,
        duration_s=min(seconds, default=None) if driven else None,
    )
    return LocustLoad(spec, stream_per_user=each is not None, shaped=driven)


def max_error_rate(options: argparse.Namespace) -> float | None:
    """Return the limit of ``--max-error-rate``, None without one.

    Raises:
        LoadTestError: it is no fraction.

    """
    text = str(options.max_error_rate).strip()
    try:
        limit = float(text) if text else None
    except ValueError:
        limit = math.nan
    require(limit is None or 0 <= limit <= 1, f"--max-error-rate {text}: expected a fraction from 0 to 1")
    return limit


def _number(options: argparse.Namespace, name: str) -> float | None:
    text = str(getattr(options, name) or "").strip()
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    require(value is None or 0 < value < math.inf, f"--{name.replace('_', '-')} {text}: must be a number above 0")
    return value


def _seconds(run_time: str | float | None) -> float | None:
    if not run_time:
        return None
    return float(parse_timespan(run_time)) if isinstance(run_time, str) else float(run_time)
