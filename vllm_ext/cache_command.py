"""``pareto cache``: what the other commands keep between runs, and how to get rid of it."""

from __future__ import annotations

import argparse
import time

from kv_cache.errors import ParetoError
from kv_cache.sizes import readable
from kv_cache.user_cache import KINDS, LIMIT_VARIABLE, cache_dir, clear, entries, limit_bytes

HELP = "list what is kept between runs, or clear it"
DESCRIPTION = f"""\
List or clear what the other commands keep between runs under $PARETO_CACHE (default ~/.cache/pareto). All of it is made
again when it is needed; what a running process uses is left alone, and so is whatever else lies in that folder.

  baselines   logits of baselines (pareto eval): gigabytes
  kv-scales   scales calibrated when a server started
  samples     text that models wrote
  kernels     compiled GPU kernels
  backends    environments of other compression tools

Above {LIMIT_VARIABLE} gigabytes (default 50) pareto eval removes what was unused longest; backends do not count.

examples:
  pareto cache
  pareto cache clear baselines
  pareto cache clear --unused-days 30
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto cache``."""
    parser.add_argument("action", nargs="?", choices=("list", "clear"), default="list", help="(default: list)")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument(
        "--unused-days", type=float, default=0.0, metavar="N", help="clear only what was unused for N days"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``pareto cache``."""
    kinds = args.kinds or list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ParetoError(f"unknown kind {unknown[0]!r}; valid: {', '.join(KINDS)}")
    if not args.unused_days >= 0:
        raise ParetoError(f"--unused-days must not be negative, got {args.unused_days}")
    if args.action == "clear":
        gone, kept = clear(kinds, unused_days=args.unused_days)
        print(f"removed {len(gone)} entries, {readable(sum(entry.size for entry in gone))}, from {cache_dir()}")
        for entry in kept:
            print(f"left, since it is in use or cannot be removed: {entry.path}")
        return 0
    found, limit = entries(kinds), limit_bytes()
    print(f"{cache_dir()} (limit {readable(limit)}, {LIMIT_VARIABLE}={limit / 1e9:g})")
    for kind in kinds:
        some = [entry for entry in found if entry.kind == kind]
        last = f", last used {_date(max(entry.used for entry in some))}" if some else ""
        print(f"  {kind:10s} {len(some):5d} entries {readable(sum(entry.size for entry in some)):>10s}{last}")
    return 0


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
