"""``pareto distill``: flags and the report; the work is in ``job.py``."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from kv_cache.errors import ParetoError
from kv_cache.terminal import console as plain_console
from quant_methods.distillation.settings import Settings
from quant_methods.threads import wait_asleep
from quant_methods.training.flags import add_shared_flags, names_in

if TYPE_CHECKING:
    from quant_methods.distillation.cut import Sizes
    from quant_methods.distillation.job import Job

HELP = "train a small model to put out what a large one does"
USER_ERRORS = (ParetoError,)
DESCRIPTION = """\
Train a student on its teacher's next-token distributions, and on text. The result is a checkpoint with the teacher's
tokenizer, which pareto compress, serve and eval take; README.md in it says how it came about.

The student is given (--student), fresh (--student-config: a YAML file such as "hidden_size: 256"), or cut out of its
teacher, what does most being kept (--keep-layers, --keep-heads, --keep-intermediate, --keep-hidden).

examples:
  pareto distill Qwen/Qwen3-1.7B --keep-layers 20 --data text.jsonl --device cuda --out qwen-20
  pareto distill ref-7m --student-config shape.yaml --data text.jsonl --kl-share 0.7 --temperature 2 --out small
  pareto distill ref-7m --student ref-7m --kv-bits 3 --targets k_proj,v_proj --data text.jsonl --out ref-7m-kv3
  pareto distill ref-7m --keep-layers 4 --weight-bits 4 --data text.jsonl --out small-w4   (learns to live with codes)
  pareto distill Qwen/Qwen3-1.7B --student Qwen/Qwen3-0.6B --data chats.jsonl --on-policy 0.5 --out qwen-own-words
  pareto distill Qwen/Qwen3-1.7B --url http://127.0.0.1:8000 --student-config shape.yaml --data text.jsonl --out small
  accelerate launch --num_processes 4 -m vllm_ext.cli distill MODEL --keep-layers 20 --data text.jsonl --out small

--data is a .txt file, or .jsonl with a "text" field or with "messages", of which the assistant's words are learnt.
--top-k keeps the teacher's most likely tokens on disk, so that it is asked once and not in memory while the student
learns; --url asks a vLLM server for them.

Interrupted? The same command goes on from the last checkpoint, to the same loss.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    default = Settings()
    parser.add_argument("teacher", metavar="TEACHER", help="directory, hub name, or ref-7m; compressed ones too")
    parser.add_argument("--data", type=Path, metavar="FILE", required=True, help="text or chats to learn on")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="directory of the student")
    parser.add_argument("--device", help="torch device (default: cuda where there is one)")
    who = parser.add_argument_group("student")
    who.add_argument("--student", metavar="MODEL", help="a model with the teacher's tokenizer")
    who.add_argument("--student-config", type=Path, metavar="FILE", help="its shape, with random weights")
    for name, what in (
        ("layers", "blocks"),
        ("heads", "query heads"),
        ("kv-heads", "heads of keys and values"),
        ("intermediate", "channels of each MLP"),
        ("hidden", "channels of hidden states"),
    ):
        who.add_argument(f"--keep-{name}", type=int, metavar="N", help=f"{what} of the teacher that are kept")
    who.add_argument("--weight-bits", type=int, metavar="BITS", help="learn with weights rounded to 2 to 8 bits")
    who.add_argument("--group-size", type=int, default=128, help="of --weight-bits (default: %(default)s)")
    who.add_argument(
        "--kv-bits", metavar="BITS", help="learn with a KV cache in codes: 3, or 4,3 for keys and values apart"
    )
    who.add_argument(
        "--targets", default="", metavar="NAMES", help="layers that learn, as k_proj,v_proj (default: all)"
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--kl-share",
        type=float,
        default=default.kl_share,
        metavar="LAMBDA",
        help="of the teacher in the loss; the text has the rest (default: %(default)s)",
    )
    loss.add_argument(
        "--temperature", type=float, default=default.temperature, help="of both models in the KL (default: %(default)s)"
    )
    loss.add_argument(
        "--loss", default=default.loss, help="forward, reverse, skew or skew-reverse KL, or jsd (default: %(default)s)"
    )
    loss.add_argument(
        "--skew",
        type=float,
        default=default.skew,
        help="of the skewed ones; of jsd the teacher's share of the mixture (default: %(default)s)",
    )
    loss.add_argument(
        "--hidden", type=float, default=default.hidden, metavar="WEIGHT", help="of hidden states' distance; 0: none"
    )
    loss.add_argument(
        "--on-policy",
        type=float,
        default=default.on_policy,
        metavar="FRACTION",
        help="of the training in which the student writes itself, and the teacher says what it would have",
    )
    loss.add_argument(
        "--new-tokens", type=int, default=default.new_tokens, help="that it writes at most (default: %(default)s)"
    )
    say = parser.add_argument_group("teacher")
    say.add_argument("--top-k", type=int, default=0, metavar="K", help="keep its K most likely tokens on disk (64)")
    say.add_argument("--teacher-cache", type=Path, metavar="DIR", help="where, for several runs to share")
    say.add_argument("--url", help="of a vLLM server that runs it; TEACHER then gives tokenizer and shape")
    loop = parser.add_argument_group("training")
    for name, kind, what in (
        ("samples", int, "sequences to train on"),
        ("held-out", int, "more of them, which decide what is kept"),
        ("length", int, "tokens of each"),
        ("epochs", float, "passes over the samples"),
        ("steps", int, "in all, in the place of --epochs"),
        ("batch", int, "sequences a step, of all devices together"),
        ("micro-batch", int, "of which so many are in memory at once (default: --batch, at most 8)"),
        ("learning-rate", float, "AdamW's"),
        ("weight-decay", float, "AdamW's"),
        ("looks", int, "at the held-out sequences; a checkpoint each"),
        ("seed", int, "of everything that is random"),
    ):
        given = getattr(default, name.replace("-", "_")) if name not in ("micro-batch", "steps") else None
        loop.add_argument(
            f"--{name}", type=kind, default=given, help=what + ("" if given is None else " (default: %(default)s)")
        )
    add_shared_flags(loop)


def checked_settings(args: argparse.Namespace) -> Settings:
    """Return the settings that the flags say, which name one student.

    Raises:
        ParetoError: a number makes no training, or there is no student, or several.

    """
    from quant_methods.distillation.job import check_one_student

    values = {field.name: getattr(args, field.name) for field in fields(Settings)}
    values["steps"] = args.steps or 0
    values["targets"] = names_in(args.targets)
    if values["micro_batch"] is None:
        values["micro_batch"] = max(size for size in range(1, 9) if args.batch % size == 0) if args.batch > 0 else 1
    settings = Settings(**values)
    settings.check()
    check_one_student(args.student, args.student_config, _sizes(args))
    if args.kv_bits is not None:
        kv_bits(args.kv_bits)
    return settings


def _sizes(args: argparse.Namespace) -> Sizes:
    from quant_methods.distillation.cut import Sizes

    return Sizes(args.keep_layers, args.keep_heads, args.keep_kv_heads, args.keep_intermediate, args.keep_hidden)


def job_of(args: argparse.Namespace) -> Job:
    """Return what the flags ask for.

    Raises:
        ParetoError: a model is not found, or a flag makes no sense.

    """
    import torch

    from quant_methods.compress import check_device
    from quant_methods.distillation.job import Job
    from quant_methods.model_source import resolve_model

    settings = checked_settings(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return Job(
        teacher=resolve_model(args.teacher, quantized=True),
        text=args.data,
        out=args.out,
        settings=settings,
        student=None if args.student is None else resolve_model(args.student),
        shape=args.student_config,
        sizes=_sizes(args),
        url=args.url,
        cache=args.teacher_cache,
        top_k=args.top_k,
        weight_bits=None if args.weight_bits is None else (args.weight_bits, args.group_size),
        kv_bits=None if args.kv_bits is None else kv_bits(args.kv_bits),
        device=device,
    )


def kv_bits(text: str) -> tuple[int, int]:
    """Return the bits of keys and of values that a flag says.

    Raises:
        ParetoError: it says none.

    """
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise ParetoError(f"--kv-bits {text}: expected 3, or 4,3 for keys and values apart")
    return int(parts[0]), int(parts[-1])


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    wait_asleep(turns=10_000)
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ParetoError("pareto distill needs accelerate: pip install 'vllm-pareto[training]'") from error
    from quant_methods.distillation.job import distill

    job = job_of(args)
    console = plain_console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    try:
        outcome = distill(job, say)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint")
        raise
    lines = [f"checkpoint   {outcome.out}, the state after step {outcome.step}"]
    for name, label in (("kl", "KL"), ("loss", "loss"), ("perplexity", "perplexity")):
        if name in outcome.best:
            lines.append(
                f"{label:<13}{outcome.start[name]:.4f} before, {outcome.best[name]:.4f} after, on held-out sequences"
            )
    if not outcome.step:
        lines.append("note         no state was better than the start: give more --samples, or a lower --learning-rate")
    bits = f"--recipe rtn-w{args.weight_bits} --search minmax" if args.weight_bits else "--recipe gptq-w4"
    lines.append(f"next         pareto compress {outcome.out} {bits} --out {outcome.out}-compressed")
    say("\n".join(lines))
    return 0
