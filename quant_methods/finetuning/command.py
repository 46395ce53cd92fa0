"""``pareto finetune``: flags and the report; the work is in ``job.py``."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from kv_cache.errors import ParetoError
from kv_cache.terminal import console as plain_console
from quant_methods.finetuning.settings import Settings
from quant_methods.threads import wait_asleep
from quant_methods.training.flags import add_shared_flags, names_in

HELP = "fine-tune a compressed model with adapters (QLoRA)"
USER_ERRORS = (ParetoError,)
NEEDS = ("accelerate", "datasets", "peft", "trl")
DESCRIPTION = """\
Teach a model by examples. Its weights stay as they are, in codes if it is compressed; beside each linear layer a
product of two narrow matrices learns (LoRA). The result is an adapter that vLLM serves over the same checkpoint, or
with --merge a checkpoint that has it inside.

MODEL is any checkpoint that pareto compress writes, one in 16 bits, or compressed-tensors, GPTQ and AWQ of other tools.

examples:
  pareto finetune ref-7m-w4 --data chats.jsonl --lora-rank 16 --out my-adapter
  vllm serve ref-7m-w4 --enable-lora --lora-modules mine=my-adapter
  pareto finetune ref-7m-w3 --data chats.jsonl --start-from ref-7m --merge --out ref-7m-w3-tuned
  pareto finetune ref-7m-w4 --data chats.jsonl --dora --merge --out ref-7m-w4-tuned
  pareto finetune ref-7m-w4 --data chats.jsonl --pooled --merge --learning-rate 1e-2 --out ref-7m-w4-tuned
  pareto finetune qwen-w4 --data chats.jsonl --device cuda --checkpointing --targets q_proj,v_proj --out my-adapter
  pareto finetune ref-7m-w4 --adapter my-adapter --merge --out ref-7m-w4-tuned                (no training)
  accelerate launch --num_processes 4 -m vllm_ext.cli finetune qwen-w4 --data chats.jsonl --out my-adapter

A line of chats.jsonl, written out by the model's chat template; the assistant's answers are what is learnt:
  {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]}
or plain text, all of which is learnt:
  {"text": "..."}

Some documents are held out; the state that does best on them is kept. --start-from lets the adapter begin as what
quantization took from each layer's outputs on the first examples (CLoQ's start): for weights that were rounded to
nearest. GPTQ's of pareto compress make up for errors of earlier layers, which such a start takes back: none is better.

Interrupted? The same command goes on from the last checkpoint, to the same loss.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    default = Settings()
    parser.add_argument("model", metavar="MODEL", help="directory, hub name, or ref-7m; compressed ones too")
    parser.add_argument("--data", type=Path, metavar="FILE", help=".jsonl with 'messages' or 'text' in each line")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="directory of the result")
    parser.add_argument("--device", help="torch device (default: cuda where there is one)")
    lora = parser.add_argument_group("adapter")
    lora.add_argument(
        "--lora-rank", type=int, default=default.rank, metavar="R", help="of products (default: %(default)s)"
    )
    lora.add_argument(
        "--lora-alpha", type=float, metavar="A", help="products are multiplied by A/R (default: twice the rank)"
    )
    lora.add_argument(
        "--dropout", type=float, default=default.dropout, help="of products' inputs (default: %(default)s)"
    )
    lora.add_argument(
        "--targets", default=",".join(default.targets), metavar="NAMES", help="layers, as q_proj,v_proj (default: all)"
    )
    lora.add_argument("--start-from", metavar="MODEL", help="begin as what quantization took from its outputs")
    lora.add_argument(
        "--dora",
        action="store_true",
        help="learn the norm of each output channel too (DoRA); vLLM serves the result merged only (--merge)",
    )
    lora.add_argument(
        "--pooled",
        action="store_true",
        help="with --merge: learn what zero-points can hold (QA-LoRA), so that nothing is added to a layer",
    )
    lora.add_argument("--merge", action="store_true", help="write a checkpoint with the adapter inside")
    lora.add_argument("--adapter", type=Path, metavar="DIR", help="merge this one, and train nothing")
    loop = parser.add_argument_group("training")
    for name, kind, what in (
        ("epochs", float, "passes over the examples"),
        ("steps", int, "in all, in the place of --epochs"),
        ("batch", int, "examples a step, of all devices together"),
        ("micro-batch", int, "of which so many are in memory at once (default: --batch, at most 4)"),
        ("length", int, "tokens of an example; longer ones are cut (default: 1024, or the model's context)"),
        ("learning-rate", float, "AdamW's"),
        ("held-out", int, "examples that decide what is kept (default: 64, or a fifth of fewer than 320)"),
        ("save-steps", int, "steps between looks at them and checkpoints (default: a tenth of all)"),
        ("seed", int, "of everything that is random"),
    ):
        given = None if "(default" in what or name == "steps" else getattr(default, name.replace("-", "_"))
        loop.add_argument(
            f"--{name}", type=kind, default=given, help=what + ("" if given is None else " (default: %(default)s)")
        )
    add_shared_flags(loop)


def settings_of(args: argparse.Namespace, model: Path) -> Settings:
    """Return the settings that the flags say."""
    from quant_methods.calibration.text_source import read_documents
    from quant_methods.model_source import read_config

    default, values = Settings(), {}
    for name in ("epochs", "batch", "learning_rate", "dropout", "seed", "checkpointing", "bfloat16", "dora", "pooled"):
        values[name] = getattr(args, name)
    context = read_config(model).get("max_position_embeddings")
    longest = min(default.length, context) if isinstance(context, int) else default.length
    micro = args.micro_batch
    if micro is None:
        micro = max(size for size in range(1, 5) if args.batch % size == 0) if args.batch > 0 else 1
    held_out = args.held_out
    if held_out is None:
        documents = sum(1 for _ in read_documents(args.data))
        held_out = default.held_out if documents >= 5 * default.held_out else max(1, documents // 5)
    return Settings(
        rank=args.lora_rank,
        alpha=2.0 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        targets=names_in(args.targets),
        steps=args.steps or 0,
        micro_batch=micro,
        length=longest if args.length is None else args.length,
        held_out=held_out,
        save_steps=args.save_steps or 0,
        **values,
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    wait_asleep(turns=10_000)
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ParetoError(f"pareto finetune needs {', '.join(missing)}: pip install 'vllm-pareto[training]'")
    console = plain_console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    if args.adapter is not None:
        return _merge_only(args, say)
    if args.data is None:
        raise ParetoError("give --data FILE to learn from, or --adapter DIR with --merge to merge one that is there")
    import torch

    from quant_methods.compress import check_device
    from quant_methods.finetuning.job import Job, finetune
    from quant_methods.model_source import resolve_model

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    model = resolve_model(args.model, quantized=True)
    job = Job(
        model=model,
        data=args.data,
        out=args.out,
        settings=settings_of(args, model),
        start_from=None if args.start_from is None else resolve_model(args.start_from),
        merged=args.merge,
        device=device,
    )
    try:
        outcome = finetune(job, say)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint")
        raise
    what = "checkpoint" if args.merge else "adapter"
    lines = [
        f"{what:<13}{outcome.out}, the state after step {outcome.step}",
        f"{'loss':<13}{outcome.before:.4f} before, {outcome.after:.4f} after, on held-out examples (nats a token)",
    ]
    if outcome.after >= outcome.before:
        lines.append(f"{'note':<13}no state was better than the start: give more data, or a smaller --learning-rate")
    if outcome.peak_bytes:
        lines.append(f"{'memory':<13}{outcome.peak_bytes / 2**30:.2f} GiB of the GPU at most")
    if args.merge:
        lines.append(f"{'next':<13}vllm serve {outcome.out}")
    elif args.dora:
        lines.append(f"{'note':<13}vLLM adds no DoRA adapters to a checkpoint; merged, this one is served")
        merged = f"pareto finetune {args.model} --adapter {outcome.out} --merge --out {outcome.out}-merged"
        lines.append(f"{'next':<13}{merged}")
    else:
        rank = "" if args.lora_rank <= 16 else f" --max-lora-rank {args.lora_rank}"
        lines.append(f"{'next':<13}vllm serve {args.model} --enable-lora{rank} --lora-modules tuned={outcome.out}")
    say("\n".join(lines))
    return 0


def _merge_only(args: argparse.Namespace, say: object) -> int:
    """Merge an adapter that is there."""
    import shutil

    from quant_methods.checkpoints.checkpoint import full_disk_explained
    from quant_methods.checkpoints.replaceable import check_apart
    from quant_methods.finetuning.merge import merge
    from quant_methods.model_source import resolve_model
    from quant_methods.training.unfinished import check_new
    from quant_methods.work_folder import locked

    if not args.merge or args.data is not None:
        raise ParetoError("--adapter DIR is for --merge, without --data: it trains nothing")
    model = resolve_model(args.model, quantized=True)
    check_new(args.out)
    check_apart(args.out, {"the model": model, "the adapter": args.adapter})
    work = args.out.with_name(f".{args.out.name}.merge")
    with full_disk_explained(work), locked(work):
        made = work / "made"
        shutil.rmtree(made, ignore_errors=True)
        try:
            merge(model, args.adapter, made)
            if args.out.exists():
                args.out.rmdir()
            made.rename(args.out)
        finally:
            shutil.rmtree(work)
    assert callable(say)
    say(f"checkpoint   {args.out}\nnext         vllm serve {args.out}")
    return 0
