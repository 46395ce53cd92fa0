"""What fine-tuning over codes costs: held-out loss, tokens a second and GPU memory beside LoRA in 16 bits and NF4.

All runs have the same data, held-out examples, order, steps and settings; only what the adapter learns over differs.
``16-bit`` is the original; ``nf4`` is the original as bitsandbytes quantizes it while loading, where that is installed
and there is a GPU; the others are checkpoints. Each run has a process of its own, so that none sees another's memory.

    python -m bench.lab.finetune_bench smollm2 --data chats.jsonl --checkpoint w4=smollm2-w4 w3=smollm2-w3 \\
        --steps 300 --device cuda --work finetune-work --out finetune.json

Stopped? The same command goes on: runs that are done are not done again, and the one that was stopped goes on from its
last checkpoint (NF4's starts again).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.environment import environment
from bench.files import write_json
from kv_cache.errors import ParetoError
from quant_methods.finetuning.examples import read_examples
from quant_methods.finetuning.job import Job, finetune
from quant_methods.finetuning.settings import Settings
from quant_methods.model_source import fingerprint, resolve_model

SCHEMA = "vllm-pareto/finetuning/1"
PLAIN, NF4 = "16-bit", "nf4"


def can_nf4(device: str) -> bool:
    """Return whether bitsandbytes is there, and a GPU for it."""
    return device.startswith("cuda") and importlib.util.find_spec("bitsandbytes") is not None


def ours(name: str, folder: Path, args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Fine-tune over a checkpoint and return the figures."""
    out = args.work / name
    job = Job(folder, args.data, out, settings, device=args.device)
    outcome = finetune(job, lambda line: print(f"{name}: {line}", flush=True))
    found = figures(out / "training_log.jsonl")
    return {
        **found,
        "kept_step": outcome.step,
        "resumed_from": outcome.resumed,
        "peak_gpu_bytes": outcome.peak_bytes or None,
        "checkpoint": fingerprint(folder),
    }


def nf4(folder: Path, args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Fine-tune the original over bitsandbytes' NF4, by peft and trl alone, and return the figures."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from quant_methods.finetuning.log import Log
    from quant_methods.finetuning.tuner import tuner, with_adapter

    work = args.work / NF4
    work.mkdir(parents=True, exist_ok=True)
    torch.cuda.reset_peak_memory_stats()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": args.device}
    )
    examples = read_examples(folder, args.data, settings.held_out, settings.seed)
    log = Log(work / "log.jsonl", lambda line: print(f"{NF4}: {line}", flush=True))
    trainer = tuner(
        with_adapter(model.requires_grad_(False), settings), folder, examples, settings, work, args.device, log
    )
    trainer.train()
    return {
        **figures(work / "log.jsonl"),
        "kept_step": trainer.state.best_global_step,
        "resumed_from": 0,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "bitsandbytes": importlib.metadata.version("bitsandbytes"),
    }


def figures(log: Path) -> dict[str, Any]:
    """Return what a log says: held-out loss before and at its best (nats a token), and the median of tokens/s."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    looks = [line["eval_loss"] for line in lines if "eval_loss" in line]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {
        "loss_before": looks[0],
        "loss_after": min(looks[1:]),
        "losses": looks,
        "tokens_per_second": statistics.median(rates) if rates else None,
    }


def against(results: dict[str, Any]) -> None:
    """Add each run's held-out loss relative to that of the 16-bit run, in percent."""
    base = results[PLAIN]["loss_after"]
    for found in results.values():
        found["loss_above_16_bit_percent"] = 100 * (found["loss_after"] / base - 1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the original in 16 bits: embedded name, folder, or hub name")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="NAME=DIR", help="compressed ones of it")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl with 'messages' or 'text' in each line")
    parser.add_argument("--rank", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; is kept")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, and write JSON."""
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    try:
        if wrong := next((word for word in args.checkpoint if "=" not in word), None):
            raise ParetoError(f"--checkpoint {wrong}: expected NAME=DIR")
        original = resolve_model(args.model)
        folders = {PLAIN: original}
        for word in args.checkpoint:
            name, _, place = word.partition("=")
            if name in (*folders, NF4) or not name or "/" in name:
                raise ParetoError(f"--checkpoint {word}: {name!r} is taken or no name; give another one")
            folders[name] = resolve_model(place, quantized=True)
        settings = Settings(
            rank=args.rank, alpha=2.0 * args.rank, steps=args.steps, batch=args.batch, micro_batch=args.micro_batch,
            length=args.length, learning_rate=args.learning_rate, held_out=args.held_out, seed=args.seed,
        )  # fmt: skip
        settings.check()
        if args.only is not None:
            own = (
                nf4(original, args, settings)
                if args.only == NF4
                else ours(args.only, folders[args.only], args, settings)
            )
            write_json(args.work / f"{args.only}.json", {"settings": settings.as_json(), **own})
            return 0
        args.work.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {}
        for name in [*folders, *([NF4] if can_nf4(args.device) else [])]:
            path = args.work / f"{name}.json"
            if not path.is_file():
                command = [sys.executable, "-m", "bench.lab.finetune_bench", *words, "--only", name]
                if subprocess.run(command, check=False).returncode:
                    raise ParetoError(f"the run {name} failed, see above; the same command goes on from here")
            results[name] = json.loads(path.read_text())
            if results[name].pop("settings") != settings.as_json():
                raise ParetoError(f"{path} is of a run with other settings; give another --work, or delete it")
        against(results)
    except ParetoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(
        args.out,
        {"schema": SCHEMA, "settings": asdict(settings), "data": args.data.name, "environment": environment(),
         "results": results},
    )  # fmt: skip
    for name, found in results.items():
        rate = "-" if found["tokens_per_second"] is None else f"{found['tokens_per_second']:,.0f} tokens/s"
        print(
            f"{name:<10}held-out loss {found['loss_before']:.4f} to {found['loss_after']:.4f} "
            f"({found['loss_above_16_bit_percent']:+.2f}% against 16 bits), {rate}"
        )
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
