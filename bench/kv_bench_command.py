"""``pareto kv-bench``: decode and prefill speed of KV-cache dtypes, side by side in one run."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.kv_bench_schema import KVBenchReport
from bench.report_rows import plain_dtype
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS

HELP = "compare decode and prefill speed of KV-cache dtypes in one alternating run"
DESCRIPTION = """\
Measure decode time per step, prefill tokens per second and KV capacity of several KV-cache dtypes, in one run.

Every round starts each dtype's engine in turn with the same settings, memory and prompts, and ratios to bf16 are taken
within a round, so that a machine that grows slower meanwhile does not favour one dtype. The engine's own steps are
timed, in the process that drives it, without HTTP.

  ms/step     one decode step of the whole batch
  context     what of it reading the context costs: the step less one with 16 tokens of context
  prefill     prompt tokens per second until every sequence has its first token

Examples:
  pareto kv-bench ref-7m
  pareto kv-bench ref-7m --kv-cache-dtype auto fp8 int4_per_head --batch 1 8 --context 1024 4096 --out results/kv
  pareto kv-bench Qwen/Qwen3-0.6B --batch 32 --context 8192 --max-num-batched-tokens 8192

The first dtype is the baseline. A dtype that cannot run here is named with the reason and left out. Results:
OUT/kv-bench.json (pareto report reads it) and OUT/kv-bench.md. Started again with the same flags, finished engines are
not measured again; --rounds can be raised.
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto kv-bench``."""
    parser.add_argument("model", metavar="MODEL", help="embedded name (ref-7m), folder, or hub name")
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", metavar="NAME",
        help="dtypes, the first the baseline (default: auto, vLLM's quantized ones and this project's per_head ones)",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=[8], metavar="N", help="sequences at once (default: 8)")
    parser.add_argument("--context", nargs="+", type=int, default=[4096], metavar="N", help="tokens (default: 4096)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="alternating rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps timed (default: %(default)s)")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N", help="prefill chunk (default: 8192 on a GPU, else 2048)"
    )
    parser.add_argument("--dtype", default="auto", help="vLLM's --dtype (default: %(default)s)")
    parser.add_argument("--kv-cache-memory-bytes", type=int, metavar="N", help="KV memory, the same for every dtype")
    parser.add_argument(
        "--enforce-eager", action=argparse.BooleanOptionalAction, help="no compilation or CUDA graphs (default: on CPU)"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: %(default)s)")
    parser.add_argument("--out", default="kv-bench", metavar="DIR", help="folder of the result (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run ``pareto kv-bench``."""
    from bench.environment import gpu_names
    from bench.files import write_text
    from bench.kv_bench import RESULT, KVBench, Settings
    from bench.plan import default_memory
    from quant_methods.model_source import resolve_model

    for flag in ("batch", "context"):
        if min(getattr(args, flag)) < 1:
            raise ParetoError(f"--{flag} must be at least 1, got {min(getattr(args, flag))}")
    for flag, least in (("rounds", 1), ("steps", 2)):
        if getattr(args, flag) < least:
            raise ParetoError(f"--{flag} must be at least {least}, got {getattr(args, flag)}")
    gpu = bool(gpu_names())
    own = [name for name, fmt in FORMATS.items() if fmt.granularity == "head"]
    vllms = ["fp8", "int8_per_token_head", "int4_per_token_head"] if gpu else ["fp8"]
    sequences = max(args.batch)
    needed = sequences * (max(args.context) + args.steps + 2 * sequences + 128)
    folder = resolve_model(args.model, quantized=True)
    memory = args.kv_cache_memory_bytes or default_memory(folder, math.ceil(needed / 2), args.tensor_parallel_size)
    settings = Settings(
        model=args.model,
        kv_cache_dtypes=tuple(dict.fromkeys(args.kv_cache_dtype or ["auto", *vllms, *own])),
        batches=tuple(sorted(set(args.batch))),
        contexts=tuple(sorted(set(args.context))),
        rounds=args.rounds,
        steps=args.steps,
        max_num_batched_tokens=args.max_num_batched_tokens or (8192 if gpu else 2048),
        dtype=args.dtype,
        kv_cache_memory_bytes=memory,
        enforce_eager=not gpu if args.enforce_eager is None else args.enforce_eager,
        tensor_parallel_size=args.tensor_parallel_size,
        seed=args.seed,
    )
    out = Path(args.out)
    report = KVBench(settings, out).run()
    write_text(out / "kv-bench.md", markdown(report))
    console = Console()
    Console(width=None if console.is_terminal else 130).print(table(report))
    print(f"wrote {out / RESULT} and {out / 'kv-bench.md'}")
    return 0


HEADINGS = (
    "KV-cache dtype", "batch x context", "ms/step", "speed", "context ms", "speed", "prefill tokens/s", "speed",
    "KV tokens", "capacity",
)  # fmt: skip


def lines(report: KVBenchReport) -> list[list[str]]:
    """Return the result as rows of text under :data:`HEADINGS`."""
    made = []
    for row in report.dtypes:
        name = plain_dtype(row.kv_cache_dtype)
        if row.error is not None or row.kv_cache is None:
            made.append([name, f"not measured: {row.error}", *[""] * (len(HEADINGS) - 2)])
            continue
        for point in row.points:
            made.append([
                name,
                f"{point.batch} x {point.context:,}",
                f"{point.step_ms.median:.2f} ({point.step_ms.low:.2f}-{point.step_ms.high:.2f})",
                _ratio(point.step_ratio),
                f"{point.context_ms.median:.2f}",
                _ratio(point.context_ratio),
                f"{point.prefill_tokens_per_s.median:,.0f} "
                f"({point.prefill_tokens_per_s.low:,.0f}-{point.prefill_tokens_per_s.high:,.0f})",
                _ratio(point.prefill_ratio),
                f"{row.kv_cache.tokens:,}",
                _ratio(row.capacity_ratio),
            ])  # fmt: skip
    return made


def _ratio(value: float | None) -> str:
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
        f"{environment['machine']}, {environment['versions']}, commit {environment['commit']}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + " --- |" * len(HEADINGS),
    ]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines(report)), ""])
