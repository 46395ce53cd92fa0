"""``pareto kv-bench``: decode and prefill speed of KV-cache dtypes, side by side in one run."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from statistics import median

from rich.table import Table

from bench.engine import plain_dtype
from bench.speed.engine_flags import add_engine_flags, chunk_of, engine_choices, folder_of
from bench.speed.schema import KVBenchReport, Spread
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS
from kv_cache.terminal import console

HELP = "compare decode and prefill speed of KV-cache dtypes in one alternating run"
DESCRIPTION = """\
Measure decode time per step, prefill tokens per second and KV capacity of several KV-cache dtypes, in one run.

Every round starts each dtype's engine in turn with the same settings, memory and prompts, and ratios to bf16 are taken
within a round, so that a machine that grows slower meanwhile does not favour one dtype. The engine's own steps are
timed, in the process that drives it, without HTTP.

  ms/step     one decode step of the whole batch
  context     what of it reading the context costs: the step less one with 16 tokens of context
  GB/s        the context's bytes divided by that time, beside what a copy within the GPU moves
  prefill     prompt tokens per second until every sequence has its first token
  from prefix the same for the second half of prompts whose first half is in the prefix cache (--prefix-hits)

Examples:
  pareto kv-bench ref-7m
  pareto kv-bench ref-7m --kv-cache-dtype auto fp8 int4_per_head --batch 1 8 --context 1024 4096 --out results/kv
  pareto kv-bench Qwen/Qwen3-0.6B --shape 1x2048 32x8192 --prefix-hits 32x8192
  pareto kv-bench bench/shapes/mistral-7b --load-format dummy --shape 32x8192 \\
      --compressed bench/shapes/mistral-7b-w4 --compressed-kv-cache-dtype auto int4_per_head

The first dtype is the baseline. A dtype that cannot run here is named with the reason and left out; the exit status is
then 1 if you asked for it by name. Results: OUT/kv-bench.json (pareto report reads it) and OUT/kv-bench.md. Started
again with the same flags, finished engines are not measured again and failed ones are; --rounds can be raised.
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto kv-bench``."""
    parser.add_argument("model", metavar="MODEL", help="embedded name (ref-7m), folder, or hub name")
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", metavar="NAME",
        help="dtypes, the first the baseline (default: auto, vLLM's quantized ones and this project's per_head ones)",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="sequences at once (default: 8)")
    parser.add_argument("--context", nargs="+", type=int, metavar="N", help="tokens (default: 4096)")
    parser.add_argument(
        "--shape", nargs="+", type=_shape, metavar="BxC",
        help="sequences x tokens of each, e.g. 32x8192, instead of every --batch with every --context",
    )  # fmt: skip
    parser.add_argument(
        "--prefix-hits", nargs="+", type=_shape, metavar="BxC", default=[],
        help="shapes in which prefill with half of each prompt in the prefix cache is timed too",
    )  # fmt: skip
    parser.add_argument(
        "--compressed", nargs="+", metavar="MODEL", default=[],
        help="the same model with compressed weights, once or more, measured beside it",
    )  # fmt: skip
    parser.add_argument(
        "--compressed-kv-cache-dtype", nargs="+", metavar="NAME",
        help="dtypes measured with --compressed (default: auto int4_per_head)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", type=_only, metavar="NAME=BxC[,BxC]", default=[],
        help="measure a row of the table (KV-cache dtype, or compressed model and dtype) in these shapes alone",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="alternating rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps timed (default: %(default)s)")
    add_engine_flags(parser)
    parser.add_argument("--out", default="kv-bench", metavar="DIR", help="folder of the result (default: %(default)s)")


def _shape(text: str) -> tuple[int, int]:
    batch, cross, context = text.partition("x")
    if not cross or not batch.isdigit() or not context.isdigit() or not int(batch) or not int(context):
        raise argparse.ArgumentTypeError(f"{text!r} is not sequences x tokens; 32x8192 would be")
    return int(batch), int(context)


def _only(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    name, equals, shapes = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not a row and its shapes; fp8=32x8192,8x2048 would be")
    return name, tuple(_shape(shape) for shape in shapes.split(","))


def _listed(shapes: set[tuple[int, int]]) -> str:
    return ", ".join(f"{batch}x{context}" for batch, context in sorted(shapes))


def run(args: argparse.Namespace) -> int:
    """Run ``pareto kv-bench``."""
    from bench.environment import gpu_names
    from bench.files import write_text
    from bench.quality.plan import default_memory
    from bench.speed.kv_bench import RESULT, KVBench, Settings
    from bench.speed.step_timer import ahead

    sizes = {"batch": args.batch or [8], "context": args.context or [4096]}
    for flag, given in sizes.items():
        if min(given) < 1:
            raise ParetoError(f"--{flag} must be at least 1, got {min(given)}")
    for flag, least in (("rounds", 1), ("steps", 2)):
        if getattr(args, flag) < least:
            raise ParetoError(f"--{flag} must be at least {least}, got {getattr(args, flag)}")
    gpu = bool(gpu_names())
    own = list(FORMATS)
    vllms = ["fp8", "int8_per_token_head", "int4_per_token_head"] if gpu else ["fp8"]
    shapes = tuple(args.shape or itertools.product(*(sorted(set(given)) for given in sizes.values())))
    named = {shape for _, own in args.only for shape in own} | set(args.prefix_hits)
    if unknown := named - set(shapes):
        raise ParetoError(f"--only and --prefix-hits name shapes that are not measured: {_listed(unknown)}")
    if args.compressed_kv_cache_dtype is not None and not args.compressed:
        raise ParetoError("--compressed-kv-cache-dtype is of the models of --compressed, and there is none; add it")
    if args.shape and (args.batch is not None or args.context is not None):
        raise ParetoError("--shape is instead of --batch and --context; give the one or the other")
    folder = folder_of(args)
    # The cache is to hold the largest batch in bf16 with what its sequences produce meanwhile.
    chunk = chunk_of(args, gpu)
    needed = max(batch * (context + args.steps + ahead(batch, context, chunk) + 128) for batch, context in shapes)
    memory = args.kv_cache_memory_bytes or default_memory(folder, math.ceil(needed / 2), args.tensor_parallel_size)
    of_compressed = args.compressed_kv_cache_dtype or ("auto", "int4_per_head")
    settings = Settings(
        model=args.model,
        kv_cache_dtypes=tuple(dict.fromkeys(args.kv_cache_dtype or ["auto", *vllms, *own])),
        shapes=tuple(dict.fromkeys(shapes)),
        rounds=args.rounds,
        steps=args.steps,
        compressed=tuple(args.compressed),
        compressed_kv_cache_dtypes=tuple(of_compressed) if args.compressed else (),
        prefix_shapes=tuple(args.prefix_hits),
        shapes_of=tuple(args.only),
        **engine_choices(args, gpu, memory),
    )
    rows = [row.name for row in settings.rows()]
    if strange := [name for name, _ in args.only if name not in rows]:
        raise ParetoError(f"--only names rows that are not measured: {', '.join(strange)}; rows are {', '.join(rows)}")
    out = Path(args.out)
    bench = KVBench(settings, out)
    report = bench.run()
    write_text(out / "kv-bench.md", markdown(report))
    console(piped_width=150).print(table(report))
    print(f"wrote {out / RESULT} and {out / 'kv-bench.md'}", flush=True)
    for name, error in bench.errors.items():
        print(f"pareto kv-bench: failed: {name}: {error}", file=sys.stderr)
    asked = args.kv_cache_dtype is not None or bool(args.compressed)
    return 1 if bench.errors and asked else 0


HEADINGS = (
    "KV-cache dtype", "batch x context", "ms/step", "speed", "context ms", "speed", "GB/s", "prefill tokens/s", "speed",
    "from prefix", "speed", "KV tokens", "capacity",
)  # fmt: skip


def lines(report: KVBenchReport) -> list[list[str]]:
    """Return the result as rows of text under :data:`HEADINGS`."""
    made = []
    for row in report.dtypes:
        name = plain_dtype(row.kv_cache_dtype)
        if row.model is not None:
            name = f"{Path(row.model).name}, {name}"
        if row.error is not None or row.kv_cache is None:
            made.append([name, f"not measured: {row.error}", *[""] * (len(HEADINGS) - 2)])
            continue
        for point in row.points:
            made.append([
                name,
                f"{point.batch} x {point.context:,}",
                spread_text(point.step_ms, ".2f"),
                ratio_text(point.step_ratio),
                f"{point.context_ms.median:.2f}",
                ratio_text(point.context_ratio),
                "-" if point.context_bytes_per_s is None else f"{point.context_bytes_per_s / 1e9:,.0f}",
                spread_text(point.prefill_tokens_per_s, ",.0f"),
                ratio_text(point.prefill_ratio),
                "-" if point.prefix_tokens_per_s is None else spread_text(point.prefix_tokens_per_s, ",.0f"),
                ratio_text(point.prefix_ratio),
                f"{row.kv_cache.tokens:,}",
                ratio_text(row.capacity_ratio),
            ])  # fmt: skip
    return made


def spread_text(values: Spread, form: str) -> str:
    """Return the median, with the extremes in brackets where there are several values."""
    if values.n == 1:
        return f"{values.median:{form}}"
    return f"{values.median:{form}} ({values.low:{form}}-{values.high:{form}})"


def _ceiling(report: KVBenchReport) -> str:
    rates = [p.copy_bytes_per_s for row in report.dtypes for p in row.points if p.copy_bytes_per_s]
    return f" A copy within the GPU moves {median(rates) / 1e9:,.0f} GB/s." if rates else ""


def ratio_text(value: float | None) -> str:
    """Return a ratio, or a dash for none."""
    return "-" if value is None else f"{value:.2f}x"


def table(report: KVBenchReport) -> Table:
    """Return the result as a table for the terminal."""
    result = Table(
        title=f"KV-cache speed of {report.model}; ratios to {plain_dtype(report.baseline)}, above 1 is better"
    )
    for index, heading in enumerate(HEADINGS):
        result.add_column(heading, justify="left" if index < 2 else "right")
    for line in lines(report):
        result.add_row(*line)
    return result


def markdown(report: KVBenchReport) -> str:
    """Return the result as a Markdown document."""
    environment = report.environment
    settings = report.settings
    head = [
        f"# KV-cache speed of {report.model}",
        "",
        f"Median of {settings['rounds']} alternating rounds (slowest and fastest in brackets), {settings['steps']} "
        f"decode steps each; ratios to {plain_dtype(report.baseline)} within a round, above 1 is better. "
        f"{environment['machine']}, {environment['versions']}, commit {environment['commit']}." + _ceiling(report),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + " --- |" * len(HEADINGS),
    ]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines(report)), ""])
