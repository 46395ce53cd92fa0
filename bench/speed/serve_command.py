"""``pareto serve-bench``: speed, memory and energy of KV-cache dtypes at the served endpoint."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from bench.speed.engine_flags import add_engine_flags, engine_choices, folder_of
from kv_cache.errors import ParetoError
from kv_cache.terminal import console

HELP = "speed, memory and energy of KV-cache dtypes at the served endpoint, in alternating rounds"
DESCRIPTION = """\
Serve a model with each KV-cache dtype in turn, load the endpoint with 1, 8 and 32 users of 2,048 tokens each, and tell
tokens per second, P50 and P95 of the latencies, memory, and joules a token, all of the same requests.

Each turn has two loads for each number of users, closed loops as pareto loadtest has them: answers of one token, which
are prefill, and answers of --output-tokens. The energy counter is read all the while: NVML's of the whole board on
NVIDIA GPUs (pip install 'vllm-pareto[energy]'), RAPL's of the processors where there is no GPU. What cannot be measured
is left out with its reason, and is never zero.

  J/token prefill   a prompt token of the first load
  J/token decode    a token of the second load after each answer's first, its prompts' energy taken off
  net               less the idle power, which is watched before each turn, for as long as the load ran
  memory            of PyTorch on the GPU at its peak, or the processes' on a CPU; weights and cache apart

Ratios to the first dtype are taken within a round, so that a machine that grows slower favours none of them.

Examples:
  pareto serve-bench ref-7m --kv-cache-dtype auto int4_per_head --batch 1 8 --context 1024
  pareto serve-bench Qwen/Qwen3-0.6B --out results/qwen3 --rounds 5
  pareto serve-bench bench/shapes/mistral-7b --load-format dummy --kv-cache-dtype auto fp8 int4_per_head --side-by-side

--side-by-side starts all servers at once, which must fit beside each other, and alternates between them: no server is
started twice. Results: OUT/serve-bench.json (pareto report reads it) and OUT/serve-bench.md. Started again with the
same flags, finished turns are not measured again and failed dtypes are; --rounds can be raised. Ctrl-C stops all
servers. Exit status: 0; 1 if a dtype could not be measured; 2 for bad input; 130 after Ctrl-C.
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto serve-bench``."""
    parser.add_argument("model", metavar="MODEL", help="embedded name (ref-7m), folder, or hub name")
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", metavar="NAME",
        default=["auto", "int8_per_head", "int4_per_head"],
        help="dtypes, the first the baseline (default: auto int8_per_head int4_per_head)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="requests in flight (default: 1 8 32)"
    )
    parser.add_argument(
        "--context", nargs="+", type=int, default=[2048], metavar="N", help="prompt tokens of each (default: 2048)"
    )
    parser.add_argument(
        "--output-tokens", type=int, default=128, metavar="N", help="of each answer (default: %(default)s)"
    )
    parser.add_argument(
        "--duration", type=float, default=10.0, metavar="S",
        help="seconds in which the requests of a load start, those in flight are awaited (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="alternating rounds (default: %(default)s)")
    parser.add_argument(
        "--idle-seconds", type=float, default=5.0, metavar="S",
        help="watch the idle power for so long before each turn; 0: do not (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--side-by-side", action="store_true", help="start all servers at once and alternate between them"
    )
    add_engine_flags(parser)
    parser.add_argument(
        "--out", default="serve-bench", metavar="DIR", help="folder of the result (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``pareto serve-bench``."""
    from bench.environment import gpu_names
    from bench.files import write_text
    from bench.quality.plan import default_memory
    from bench.server import terminated_like_interrupted
    from bench.speed.energy import LEAST_WINDOW_S
    from bench.speed.serve_bench import LEAST_DURATION_S, RESULT, SPARE_TOKENS, ServeBench, Settings
    from bench.speed.served_table import markdown, notes, table

    for flag, least in (("batch", 1), ("context", 1), ("rounds", 1), ("output_tokens", 2), ("tensor_parallel_size", 1)):
        given = getattr(args, flag)
        if min(given if isinstance(given, list) else [given]) < least:
            raise ParetoError(f"--{flag.replace('_', '-')} must be at least {least}, got {given}")
    if not LEAST_DURATION_S <= args.duration < math.inf:
        raise ParetoError(
            f"--duration must be at least {LEAST_DURATION_S:g} s, so that energy can be told, got {args.duration:g}"
        )
    if args.idle_seconds and not LEAST_WINDOW_S <= args.idle_seconds < math.inf:
        raise ParetoError(
            f"--idle-seconds must be at least {LEAST_WINDOW_S:g}, or 0 for no idle power, got {args.idle_seconds:g}"
        )
    longest = max(args.context) + args.output_tokens + SPARE_TOKENS + 128
    folder = folder_of(args)
    memory = args.kv_cache_memory_bytes or default_memory(folder, longest, args.tensor_parallel_size, max(args.batch))
    settings = Settings(
        model=args.model,
        kv_cache_dtypes=tuple(dict.fromkeys(args.kv_cache_dtype)),
        batches=tuple(dict.fromkeys(args.batch)),
        contexts=tuple(dict.fromkeys(args.context)),
        output_tokens=args.output_tokens,
        duration_s=args.duration,
        rounds=args.rounds,
        idle_s=args.idle_seconds,
        side_by_side=args.side_by_side,
        **engine_choices(args, bool(gpu_names()), memory),
    )
    out = Path(args.out)
    bench = ServeBench(settings, out)
    with terminated_like_interrupted():
        report = bench.run()
    write_text(out / "serve-bench.md", markdown(report))
    console(piped_width=200).print(table(report))
    for note in notes(report):
        print(f"note: {note}")
    print(f"wrote {out / RESULT} and {out / 'serve-bench.md'}", flush=True)
    errors = bench.turns.errors
    for name, error in errors.items():
        print(f"pareto serve-bench: failed: {name}: {error}", file=sys.stderr)
    return 1 if errors else 0
