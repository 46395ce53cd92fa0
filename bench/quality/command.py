"""``pareto eval``: what a quantized model or KV cache costs in quality, measured through vLLM."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from bench.engine import json_flag
from bench.quality.plan import Settings, make_plan
from bench.quality.schema import ConfigurationResult, EvalReport, TaskResult, shown_p
from bench.quality.tasks.run import ALL, TaskSettings
from bench.schema import Estimate
from kv_cache.errors import ParetoError
from kv_cache.terminal import console

HELP = "measure perplexity, KL divergence, top-1 agreement, retrieval and tasks through vLLM"
DESCRIPTION = """\
Measure what compression costs in quality, in the engine that serves it.

MODEL is served by vLLM once with each --kv-cache-dtype and compared, token by token and over the full vocabulary, with
the baseline: the unquantized model with a bfloat16 KV cache. Prompts are prefilled in chunks of at most --chunk-tokens,
so that the context is read back from the cache's codes (a prompt prefilled at once would not show the cache's error).

  perplexity   of the text, and its change against the baseline, with a 95% interval over windows
  KL           KL divergence (baseline || tested), nats per token
  top-1        how often both put the same token first
  needle       greedy retrieval of a planted number, by context length and depth
  tasks        lm-eval's, with calibration error, Brier score and answers that change; each change beside the baseline
               with its p, also for the whole table, and a verdict of non-inferiority against --margin

Examples:
  # the embedded model: bf16 against three KV-cache dtypes, on text that the model writes itself
  pareto eval ref-7m --kv-cache-dtype fp8 int8_per_head int4_per_head --out results/ref-7m

  # a compressed checkpoint against its original, on a text of your own
  pareto eval ./ref-7m-w4 --baseline ref-7m --text wiki.txt --out results/w4

  # lm-eval's tasks with a quantized KV cache, questions from files; what changes beside bf16, question by question
  pareto eval MODEL --kv-cache-dtype int4_per_head --tasks mmlu arc_easy gsm8k --task-data ./tasks \\
      --num-fewshot mmlu=5 gsm8k=8 --num-windows 0 --no-needle --out results/tasks

  # quick look: two short windows, no retrieval
  pareto eval ref-7m --kv-cache-dtype fp8 --num-windows 2 --window-tokens 512 --no-needle --out /tmp/quick

The result is OUT/eval.json (pareto report reads it). An interrupted run continues when started again with the same
flags. A configuration that fails, because its engine does not start or computes what is not defined, is recorded with
its reason; the others are measured, the exit status is 1, and the same flags try it again. The baseline's logits are
cached under $PARETO_CACHE (default ~/.cache/pareto) and reused by later runs: two bytes for each window token and
vocabulary entry.
"""
USER_ERRORS = (ParetoError,)
TASKS_CAPTION = """\
p: of no change from the baseline; Holm: adjusted for the whole table; smallest: smallest change that so many questions
show (80% power); verdict: by the 95% interval of the change; pt: points; ~: from one wrong answer to another"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto eval``."""
    d = Settings(model="")
    parser.add_argument("model", metavar="MODEL", help="embedded name (ref-7m), folder, or hub name")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the result, eval.json")
    parser.add_argument(
        "--baseline", metavar="MODEL", help="reference model (default: MODEL, or what it was made from)"
    )
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", default=list(d.kv_cache_dtypes), metavar="NAME",
        help="KV-cache dtypes to test, vLLM's or this project's (default: auto, the model's own)",
    )  # fmt: skip
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help=".txt or .jsonl (default: model's samples)"
    )
    parser.add_argument(
        "--num-windows", type=int, default=d.num_windows, metavar="N", help="windows of each text (%(default)s)"
    )
    parser.add_argument(
        "--window-tokens", type=int, default=d.window_tokens, metavar="N", help="tokens in a window (%(default)s)"
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=d.chunk_tokens, metavar="N", help="longest prefill chunk (%(default)s)"
    )
    parser.add_argument(
        "--needle", action=argparse.BooleanOptionalAction, default=True, help="measure retrieval (default: yes)"
    )
    parser.add_argument(
        "--needle-lengths", nargs="+", type=int, default=list(d.needle_lengths), metavar="N", help="context lengths"
    )
    parser.add_argument(
        "--needle-depths", nargs="+", type=float, default=list(d.needle_depths), metavar="F", help="depths, 0 to 1"
    )
    parser.add_argument(
        "--needles-per-cell", type=int, default=d.needles_per_cell, metavar="N", help="trials a cell (%(default)s)"
    )
    parser.add_argument("--haystack", metavar="DIR", help="folder of .txt files to hide needles in (default: the text)")
    parser.add_argument("--seed", type=int, default=d.seed, help="seed of samples and needles (%(default)s)")
    parser.add_argument("--dtype", default=d.dtype, help="vLLM's --dtype (%(default)s)")
    parser.add_argument("--kv-cache-memory-bytes", type=int, metavar="N", help="KV memory, the same for every dtype")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs (%(default)s)")
    parser.add_argument(
        "--enforce-eager", action=argparse.BooleanOptionalAction, default=True, help="no CUDA graphs (default: yes)"
    )
    t = d.tasks
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME",
        help="tasks and groups, lm-eval's and ours, * and ? as in a shell, such as mmlu ruler xstest (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--task-data", metavar="DIR", help="take questions from DIR/TASK/SPLIT.jsonl or .csv (default: from the hub)"
    )
    parser.add_argument(
        "--task-limit", nargs="+", default=[], metavar="[TASK=]N",
        help="questions of each task, or of some: 100, or mmlu=20 ruler=50 (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--num-fewshot", nargs="+", default=[], metavar="[TASK=]N",
        help="examples before each question, for all tasks or for some: 5, or mmlu=5 gsm8k=8 (default: a task's own)",
    )  # fmt: skip
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="put questions into the model's chat template"
    )
    parser.add_argument(
        "--task-context", type=int, default=t.max_model_len, metavar="N",
        help="longest context of tasks, and the length of RULER's (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--margin", type=float, default=d.margin * 100, metavar="POINTS",
        help="loss of a task's score, in points, that does not matter: what non-inferior is about (%(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--compilation-config", metavar="JSON", help="vLLM's, with --no-enforce-eager (default: vLLM's own choice)"
    )


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the checked settings of parsed flags.

    Raises:
        ParetoError: a value is out of range.

    """
    for flag in ("chunk_tokens", "needles_per_cell", "tensor_parallel_size", "task_context"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ParetoError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.num_windows < 0 or not (args.num_windows or args.tasks):
        raise ParetoError(f"--num-windows must be at least 1, or 0 with --tasks, got {args.num_windows}")
    if not args.num_windows and args.needle and not args.haystack:
        raise ParetoError("needles are hidden in the text: with --num-windows 0 give --haystack, or --no-needle")
    if args.task_data and not args.tasks:
        raise ParetoError("--task-data is of --tasks: name the tasks")
    if not 0 < args.margin < 100:
        raise ParetoError(f"--margin is in points, above 0 and below 100 (1 is 0.01), got {args.margin:g}")
    json_flag("compilation_config", args.compilation_config)
    if args.window_tokens < 2:
        raise ParetoError(f"--window-tokens must be at least 2, got {args.window_tokens}")
    bad = [depth for depth in args.needle_depths if not 0 <= depth <= 1]
    if bad:
        raise ParetoError(f"--needle-depths are between 0 (start) and 1 (end), got {bad[0]}")
    return Settings(
        model=args.model,
        baseline=args.baseline,
        kv_cache_dtypes=tuple(args.kv_cache_dtype),
        texts=tuple(args.text),
        num_windows=args.num_windows,
        window_tokens=args.window_tokens,
        chunk_tokens=args.chunk_tokens,
        needle_lengths=tuple(args.needle_lengths) if args.needle else (),
        needle_depths=tuple(args.needle_depths),
        needles_per_cell=args.needles_per_cell,
        haystack=args.haystack,
        seed=args.seed,
        dtype=args.dtype,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        tensor_parallel_size=args.tensor_parallel_size,
        enforce_eager=args.enforce_eager,
        compilation_config=args.compilation_config,
        tasks=TaskSettings(
            tasks=tuple(args.tasks),
            data=args.task_data,
            limit=_by_task(args.task_limit, "--task-limit", 1),
            num_fewshot=_by_task(args.num_fewshot, "--num-fewshot", 0),
            chat=args.apply_chat_template,
            max_model_len=args.task_context,
        ),
        margin=args.margin / 100,
    )


def _by_task(words: Sequence[str], flag: str, least: int) -> tuple[tuple[str, int], ...]:
    """Return numbers with the names of tasks that each is for."""
    found = []
    for word in words:
        names, equals, number = word.rpartition("=")
        if not number.isdecimal() or int(number) < least or (equals and not names):
            raise ParetoError(f"{flag} {word}: give a number of at least {least}, or a task's, such as mmlu=5")
        found.append((names or ALL, int(number)))
    return tuple(found)


def run(args: argparse.Namespace) -> int:
    """Run ``pareto eval``."""
    from bench.quality.evaluate import RESULT, Evaluation

    plan = make_plan(settings_from(args))
    out = Path(args.out)
    errors = console(stderr=True)
    if plan.skipped_lengths:
        lengths = ", ".join(map(str, plan.skipped_lengths))
        errors.print(f"needle lengths beyond the model's context are left out: {lengths}")
    report = Evaluation(plan, out, errors).run()
    console(piped_width=130).print(table(report))
    if any(row.tasks for row in report.configurations):
        console(piped_width=170).print(task_table(report))
    print(f"wrote {out / RESULT}", flush=True)
    for failure in report.failed:
        print(f"pareto eval: failed: {failure.name}: {failure.error}", file=sys.stderr)
    return 1 if report.failed else 0


def table(report: EvalReport) -> Table:
    """Return the result as a table, one row a configuration; those that failed last, with their reasons."""
    result = Table(title="Quality through vLLM")
    for heading in ("configuration", "KV bits", "KV tokens", "perplexity", "change", "KL (nats)", "top-1", "needle"):
        result.add_column(heading, justify="left" if heading == "configuration" else "right")
    for row in report.configurations:
        result.add_row(*_cells(row))
    for failure in report.failed:
        result.add_row(f"{failure.name}\nfailed: {failure.error}", *["-"] * (len(result.columns) - 1))
    return result


def task_table(report: EvalReport) -> Table:
    """Return the tasks' results as a table: a section for each task and metric, a row for each configuration."""
    result = Table(title="Tasks", caption=TASKS_CAPTION, box=box.SIMPLE_HEAD)
    left = ("task, metric", "configuration", "verdict (margin)")
    headings = (*left[:2], "value", "change", "p", "Holm", "smallest", left[2], "gained, lost", "same", "read")
    for heading in headings:
        # A verdict is never parted from its margin.
        result.add_column(heading, justify="left" if heading in left else "right", no_wrap=heading == left[2])
    rows = [(configuration.name, one) for configuration in report.configurations for one in configuration.tasks]
    for name in dict.fromkeys(one.task for _, one in rows):
        for metric in dict.fromkeys(one.metric for _, one in rows if one.task == name):
            section = [(label, one) for label, one in rows if (one.task, one.metric) == (name, metric)]
            for index, (label, one) in enumerate(section):
                result.add_row(
                    ("" if index else f"{name}, {metric}\n{one.questions:,} questions"), label,
                    _plain(one.value, "{:.4f}"), _plain(one.change, "{:+.4f}").replace("±+", "±"),
                    shown_p(one.p) or "-", shown_p(one.p_holm) or "-",
                    "-" if one.smallest is None else f"{one.smallest:.4f}", one.judged or "-", _moved(one),
                    "-" if one.agreement is None else f"{one.agreement:.1%}", f"{one.read:.1%}",
                    end_section=index == len(section) - 1,
                )  # fmt: skip
    return result


def _moved(row: TaskResult) -> str:
    if row.flips is not None:
        return f"+{row.flips.wrong_to_right:,} -{row.flips.right_to_wrong:,} ~{row.flips.wrong_to_wrong:,}"
    return "-" if row.gained is None or row.lost is None else f"+{row.gained:,} -{row.lost:,}"


def _cells(row: ConfigurationResult) -> list[str]:
    text, bits = row.overall, row.kv_cache.bits_per_element
    return [
        row.name + (" (baseline)" if row.is_baseline else ""),
        "-" if bits is None else f"{bits:.2f}",
        f"{row.kv_cache.tokens:,}",
        "-" if text is None else f"{text.perplexity.value:.3f}",
        _signed(text.perplexity_change if text else None),
        _plain(text.kl if text else None, "{:.5f}"),
        _plain(text.top1_agreement if text else None, "{:.4f}"),
        _plain(row.needle.accuracy if row.needle else None, "{:.3f}"),
    ]


def _plain(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "-"
    error = "" if estimate.standard_error is None else " ±" + form.format(estimate.standard_error)
    return form.format(estimate.value) + error


def _signed(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    error = "" if estimate.standard_error is None else f" ±{estimate.standard_error:.2%}"
    return f"{estimate.value:+.2%}{error}"
