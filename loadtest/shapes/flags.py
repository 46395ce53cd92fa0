"""The flags of shapes and arrivals, which ``pareto loadtest`` and the locustfile share, and the stage they ask for."""

from __future__ import annotations

import argparse
import math
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.shapes.arrivals import ARRIVALS
from loadtest.shapes.registry import PROFILES
from loadtest.stage_spec import TRACE, StageSpec


def add_shape_arguments(group: Any) -> None:
    """Declare the flags; ``group`` is argparse's or Locust's."""
    group.add_argument(
        "--ramp",
        default="",
        metavar="FROM:TO:TIME",
        help="from FROM to TO in TIME: users as 1:20:60s, or requests a second as 1/s:20/s:60s",
    )
    group.add_argument(
        "--steps",
        nargs="+",
        default="",
        metavar="LEVEL:TIME",
        help="levels one after the other in one stage: users as 4:30 16:30, or requests a second as 4/s:30 16/s:1m",
    )
    group.add_argument(
        "--trace-speed",
        type=float,
        default=1.0,
        metavar="F",
        help="replay the times of --trace F times as fast (default: 1)",
    )
    group.add_argument("--arrival", choices=tuple(ARRIVALS), default="poisson", help="open loop (default: poisson)")
    group.add_argument(
        "--burstiness", type=float, default=1.0, help="of poisson arrivals: below 1 bursts, above 1 is regular"
    )


def shaped_stage(args: argparse.Namespace, otherwise: bool) -> StageSpec | None:
    """Return the stage of ``--ramp``, ``--steps`` or a trace, with its shape and length; None where there is none.

    Args:
        args: the flags.
        otherwise: whether other flags say how much load there is; then a trace gives its prompts only.

    Raises:
        LoadTestError: a value is no good, or two flags contradict each other.

    """
    if not 0 < args.burstiness < math.inf:
        raise LoadTestError(f"--burstiness {args.burstiness:g}: must be above 0")
    # Locust's web UI gives a list as one text.
    words = {
        name: value if isinstance(value, str) else " ".join(value) for name in PROFILES if (value := vars(args)[name])
    }
    if len(words) > 1 or (words and otherwise):
        raise LoadTestError("--concurrency, --rate, --ramp and --steps exclude each other")
    speed = args.trace_speed
    if not 0 < speed < math.inf:
        raise LoadTestError(f"--trace-speed {speed:g}: must be above 0")
    trace = bool(getattr(args, "trace", None)) and not words and not otherwise
    if speed != 1.0 and not trace:
        raise LoadTestError("--trace-speed needs --trace, and no other flag that says when requests start")
    if trace:
        return StageSpec(shape=TRACE, speed=speed)
    for name, profile in words.items():
        try:
            shape = PROFILES[name].parse(profile)
        except LoadTestError as error:
            raise LoadTestError(f"--{name} {profile}: {error}") from None
        is_rate = "/s" in profile
        return StageSpec(
            concurrency=None if is_rate else math.ceil(shape.peak),
            rate=shape.peak if is_rate else None,
            duration_s=shape.seconds,
            shape=name,
            profile=profile,
        )
    return None
