"""Whether tasks asked in this project's engine are answered as by lm-eval's own vLLM model, and in what time.

Both are given the same definitions, questions and examples, bf16 weights and KV cache; lm-eval keeps vLLM's own
settings. A question counts as answered otherwise if its choice, or the score of an answer that was generated, is not
the same. For those the difference of the log-likelihoods of the two choices says whether it was a near-tie. --control
asks lm-eval's model once more with steps of another size: what then changes is bf16's rounding, and nobody's fault.

    python -m bench.lab.task_agreement MODEL --tasks mmlu arc_easy hellaswag --num-fewshot mmlu=5 --task-data DIR \\
        --out results/gpu-task-agreement
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import engine
from bench.environment import environment
from bench.files import write_json
from bench.quality.command import add_arguments, settings_from
from bench.quality.plan import Plan, make_plan
from bench.quality.tasks.run import Chosen, Scores, ask, choose, number_of, scores, scratch
from kv_cache.errors import ParetoError

SCHEMA = "vllm-pareto/task-agreement/1"
Found = dict[str, tuple[list[Scores], float]]
"""By task its scores, and the seconds that they took."""


CONTROL = {"max_num_seqs": 16, "max_num_batched_tokens": 4096}
"""vLLM's sizes of a step in the control."""


def theirs(plan: Plan, chosen: Chosen, **sizes: int) -> tuple[Found, float]:
    """Return what lm-eval's own vLLM model answers, and the seconds that its start took."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.vllm_causallms import VLLM

    engine.quiet()
    tasks, clock = plan.settings.tasks, time.perf_counter()
    memory = plan.task_engine_settings(plan.configurations[0]).kv_cache_memory_bytes
    model = VLLM(
        str(plan.configurations[0].checkpoint.folder), max_model_len=tasks.max_model_len, batch_size="auto",
        kv_cache_memory_bytes=memory, gpu_memory_utilization=0.05, **sizes,
    )  # fmt: skip
    started = time.perf_counter() - clock
    found: Found = {}
    for name, task in chosen.tasks.items():
        task.set_fewshot_seed(seed=tasks.seed)
        clock = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            result = evaluate(
                model, {"tasks": {name: task}, "groups": {}, "group_map": {}}, bootstrap_iters=0, verbosity="ERROR",
                limit=number_of(chosen.settings[name].limit),
            )  # fmt: skip
        assert result is not None
        made = scores(name, task, result["results"][name], result["samples"][name], 0.0)
        found[name] = made, time.perf_counter() - clock
        print(f"lm-eval: {name}: {found[name][1]:.1f} s", file=sys.stderr, flush=True)
    engine.stop_llm(model.model)
    del model
    gc.collect()
    return found, started


def ours(plan: Plan, chosen: Chosen) -> tuple[Found, float]:
    """Return what this project's engine answers, and the seconds that its start took."""
    settings, clock = plan.task_engine_settings(plan.configurations[0]), time.perf_counter()
    found: Found = {}
    with engine.running(settings) as llm:
        started, capacity = time.perf_counter() - clock, engine.kv_cache(llm, settings).tokens
        for name, task in chosen.tasks.items():
            clock = time.perf_counter()
            made = ask(llm, task, chosen.settings[name], engine.on_gpu(llm), capacity, lambda what: None)
            found[name] = made, time.perf_counter() - clock
            print(f"ours: {name}: {found[name][1]:.1f} s", file=sys.stderr, flush=True)
    return found, started


def compared(mine: Sequence[Scores], other: Sequence[Scores]) -> dict[str, Any]:
    """Return how far two tables of a task's scores agree, by question."""
    row: dict[str, Any] = {"values": {}}
    for one in mine:
        same = next(score for score in other if score.metric == one.metric)
        if not one.choices:
            row["values"][one.metric] = [one.value, same.value]
            continue
        gaps = []
        for key, choice in one.choices.items():
            chosen = same.choices[key].chosen
            if chosen != choice.chosen:
                p, q = choice.probabilities[choice.chosen], choice.probabilities[chosen]
                gaps.append(math.log(p / max(q, 1e-30)))
        row |= {"questions": len(one.choices), "other": len(gaps), "largest_gap_nats": max(gaps, default=0.0)}
    if "questions" not in row and (first := next((one for one in mine if one.questions), None)) is not None:
        same = next(score for score in other if score.metric == first.metric)
        changed = sum(value != same.questions[key] for key, value in first.questions.items())
        row |= {"questions": len(first.questions), "other": changed, "largest_gap_nats": None}
    row["read"] = mine[0].read
    return row


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--control", action="store_true", help="ask lm-eval's model twice, with steps of two sizes")
    args = parser.parse_args()
    args.num_windows, args.needle = 0, False
    try:
        plan = make_plan(settings_from(args))
        with scratch() as folder:
            tokenizer = plan.configurations[0].checkpoint.folder
            chosen = choose(plan.settings.tasks, tokenizer, Path(folder))
            (other, other_start), (mine, my_start) = theirs(plan, chosen), ours(plan, chosen)
            control = theirs(plan, chosen, **CONTROL)[0] if args.control else {}
    except ParetoError as error:
        print(f"task_agreement: error: {error}", file=sys.stderr)
        return 2
    rows = {name: compared(mine[name][0], other[name][0]) for name in mine}
    seconds = {name: {"ours": mine[name][1], "lm_eval": other[name][1]} for name in mine}
    total = {
        "ours": sum(one["ours"] for one in seconds.values()),
        "lm_eval": sum(o["lm_eval"] for o in seconds.values()),
    }
    report: dict[str, Any] = {
        "schema": SCHEMA, "command": " ".join(["python -m bench.lab.task_agreement", *sys.argv[1:]]),
        "environment": environment(), "start_s": {"ours": my_start, "lm_eval": other_start}, "asked_s": total,
        "ratio": total["ours"] / total["lm_eval"], "tasks": rows, "seconds": seconds,
    }  # fmt: skip
    if control:
        report["control"] = {name: compared(control[name][0], other[name][0]) for name in control}
        changed = sum(row["other"] for row in report["control"].values())
        print(f"lm-eval's own answers that are others with steps of another size: {changed}")
    write_json(Path(args.out) / "task-agreement.json", report)
    questions, changed = (sum(row[key] for row in rows.values()) for key in ("questions", "other"))
    print(
        f"{changed} of {questions:,} answers are others; largest gap of likelihoods "
        f"{max(row['largest_gap_nats'] or 0.0 for row in rows.values()):.3f} nats; "
        f"ours {total['ours']:.1f} s, lm-eval {total['lm_eval']:.1f} s: {report['ratio']:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
