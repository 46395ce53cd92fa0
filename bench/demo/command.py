"""``pareto demo``: the whole chain on the embedded model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kv_cache.errors import ParetoError

HELP = "run the whole chain on the embedded model: compress, evaluate, serve, load-test, report"
DESCRIPTION = """\
Run the whole chain on a small model, on any machine and without downloads.

  1. compress   the weights to 4 bits (GPTQ)
  2. eval       bf16, int8 and int4 KV caches, 4-bit weights, and 4-bit weights with an int4 KV cache
  3. serve      each of the five, and load-test it
  4. report     one page with the table, the Pareto frontier, retrieval and latencies

Examples:
  pareto demo
  pareto demo --model ./my-model --kv-cache-dtype int8_per_head int6_per_head --out my-demo

Everything lies in OUT: the checkpoint, results, logs and report.html. Ctrl-C stops all processes and keeps what is
finished; the same command goes on.
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto demo``."""
    parser.add_argument("--model", default="ref-7m", metavar="MODEL", help="model to start from (default: %(default)s)")
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="folder of everything (default: %(default)s)")
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", default=["int8_per_head", "int4_per_head"], metavar="NAME",
        help="quantized KV-cache dtypes; the last is also combined with 4-bit weights (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run ``pareto demo``."""
    from rich.console import Console
    from rich.table import Table

    from bench.demo.demo import Demo, Size
    from bench.report.documents import collect
    from bench.report.rows import make_rows
    from bench.report.table import console

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    demo = Demo(args.model, Path(args.out), tuple(args.kv_cache_dtype), Size(), say)
    page = demo.run()
    table = Table(title="Quality, memory and speed")
    rows, _ = make_rows(collect(demo.results()), context_tokens=0)
    headings, lines = console(rows)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for line in lines:
        table.add_row(*line)
    Console(width=None if Console().is_terminal else 150).print(table)
    print(f"report: {page}")
    return 0
