"""``pareto report``: results of any commands in, one HTML page and one JSON file out."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from kv_cache.errors import ParetoError

HELP = "turn result files into one HTML page with the Pareto frontier, and one JSON file"
DESCRIPTION = """\
Join the results of eval, loadtest, kv-bench, serve-bench and compress into one self-contained HTML page and one JSON
file.

RESULTS are files or folders (searched for result files). Figures of one configuration, a model with a KV-cache dtype,
become one row: a load test belongs to the configuration that its --label names as eval does ("ref-7m, int4_per_head
KV"), or else to the model and cache dtype that its server reported.

Examples:
  pareto report demo-out
  pareto report results/ref-7m results/load-*/summary.json --out report.html --title "ref-7m on one H100"

The page needs no network, follows the reader's light or dark colours, and marks the configurations that no other one
beats: quality against memory, throughput and decode speed. Files that cannot be used are named, one line each; the exit
status is 2 when none can be.
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto report``."""
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="result files or folders")
    parser.add_argument("--out", default="pareto-report.html", metavar="FILE", help="the page (default: %(default)s)")
    parser.add_argument("--title", default="Compressed serving: quality, memory and speed", help="the page's title")
    parser.add_argument(
        "--context-tokens", type=int, default=32_768, metavar="N",
        help="tokens of KV cache counted as memory beside the weights, e.g. 8 x 4096 (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run ``pareto report``."""
    from bench.files import write_json, write_text
    from bench.report.documents import REPORT, collect
    from bench.report.page import render
    from bench.report.rows import frontiers, make_rows, to_json

    if args.context_tokens < 0:
        raise ParetoError(f"--context-tokens must not be negative, got {args.context_tokens}")
    out = Path(args.out)
    if out.is_dir():
        out = out / "report.html"
    inputs = collect([Path(path) for path in args.results])
    for line in inputs.skipped:
        print(f"left out: {line}", file=sys.stderr)
    if not inputs.documents:
        raise ParetoError("no usable result files; run pareto eval, loadtest or kv-bench first")
    rows, notes = make_rows(inputs, args.context_tokens)
    trade_offs = frontiers(rows, args.context_tokens)
    write_text(out, render(args.title, inputs, rows, trade_offs, notes))
    data = out.with_suffix(".json")
    document = {
        "schema": REPORT,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "context_tokens": args.context_tokens,
        **to_json(rows, trade_offs),
        "skipped": inputs.skipped,
        "notes": notes,
    }
    write_json(data, document)
    print(f"wrote {out} and {data}: {len(rows)} configurations")
    return 0
