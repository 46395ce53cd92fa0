"""What fine-tuning over codes costs and loses beside 16 bits: held-out loss, peak memory, tokens a second.

Each run has the same examples, steps, batch and adapter. ``lora-16bit`` learns over the original; every --coded
checkpoint over its codes; ``bitsandbytes-nf4`` is plain peft over the NF4 codes of bitsandbytes, where that is
installed and there is a GPU. A run's figures lie in OUT/NAME.json as soon as it is done, and it is not done again; a
killed run goes on from its last checkpoint. The original's loss before any step is what there was to gain.

    python -m bench.lab.finetuning HuggingFaceTB/SmolLM2-135M-Instruct --coded smol-w4 --coded smol-w3 \\
        --data chats.jsonl --steps 300 --device cuda --out results/finetuning
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import environment
from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import write_json
from quant_methods.finetuning.coded_linear import CodedLinear
from quant_methods.finetuning.examples import Examples, read_examples
from quant_methods.finetuning.load import load_coded
from quant_methods.finetuning.settings import Settings
from quant_methods.model_source import fingerprint, name_of, resolve_model
from quant_methods.training.arguments import products_dtype
from quant_methods.training.checkpoints import last_whole
from quant_methods.training.log import Log

NF4 = "bitsandbytes-nf4"
AS_BY_DEFAULT = ("rank", "batch", "micro_batch", "length", "learning_rate", "held_out", "save_steps", "seed")
"""Settings that have a flag here, with the default that ``pareto finetune`` has."""


def nf4(model: Path, device: str) -> Any:
    """Return a model in bitsandbytes' NF4 codes with double quantization, as QLoRA's authors train."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=settings, device_map={"": device}, dtype=torch.bfloat16
    )
    return loaded.requires_grad_(False)


def weight_bytes(model: Any) -> int:
    """Return the memory of a model's weights, each counted once."""
    held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    coded = sum(module.stored_bytes for module in model.modules() if isinstance(module, CodedLinear))
    return sum(held.values()) + coded


def run(
    load: Callable[[], Any], model: Path, examples: Examples, settings: Settings, work: Path, device: str,
    start_from: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Train one adapter, or what is left of it, and return its figures."""
    from quant_methods.finetuning.start import start_from_error
    from quant_methods.finetuning.tuner import first_tokens, tuner, with_adapter

    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    work.mkdir(parents=True, exist_ok=True)
    base: nn.Module = load()
    weights = weight_bytes(base)
    adapted = with_adapter(base, settings)
    log = work / "log.jsonl"
    trainer = tuner(adapted, model, examples, settings, work, device, Log(log, lambda line: print(line, flush=True)))
    before, share = last_whole(work), None
    if start_from is not None and before is None:
        share = start_from_error(adapted, start_from, first_tokens(trainer))
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=None if before is None else str(before))
    seconds = time.monotonic() - began
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    return {
        "held_out_loss": {"before": losses[0], "best": min(losses.values()), "last": losses[max(losses)]},
        "by_step": losses,
        "tokens_per_second": rates[len(rates) // 2] if rates else None,
        "weight_bytes": weights,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "seconds_of_the_last_run": round(seconds, 1),
        "went_on": before is not None,
        "error_taken_back_at_the_start": share,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the original, in 16 bits")
    parser.add_argument("--coded", action="append", default=[], metavar="DIR", help="the same, compressed; repeat")
    parser.add_argument(
        "--start-from-error", action="store_true", help="coded ones also with an adapter that starts as the error"
    )
    parser.add_argument("--data", type=Path, required=True, help=".jsonl with 'messages' or 'text'")
    parser.add_argument("--out", type=Path, required=True, help="directory of the figures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300)
    for name in AS_BY_DEFAULT:
        given = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(given), default=given)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Do the runs that are not done yet; returns the exit status."""
    args = parse(words)
    original = resolve_model(args.model)
    given = {name: getattr(args, name) for name in ("steps", *AS_BY_DEFAULT)}
    settings = dataclasses.replace(Settings(), alpha=2.0 * args.rank, **given)
    settings.check()
    dtype = products_dtype(settings, args.device)
    examples = read_examples(original, args.data, settings.held_out, settings.seed)
    runs: dict[str, tuple[Callable[[], Any], Path | None, Path]] = {
        "lora-16bit": (partial(load_coded, original, args.device, dtype), None, original)
    }
    for text in args.coded:
        coded = resolve_model(text, quantized=True)
        runs[coded.name] = partial(load_coded, coded, args.device, dtype), None, coded
        if args.start_from_error:
            runs[f"{coded.name}-from-error"] = partial(load_coded, coded, args.device, dtype), original, coded
    if args.device.startswith("cuda") and importlib.util.find_spec("bitsandbytes"):
        runs[NF4] = partial(nf4, original, args.device), None, original
    about = {"data": examples.describe(), "settings": settings.as_json()}
    for name, (load, start, checkpoint) in runs.items():
        path = args.out / f"{name}.json"
        identity = {**about, "model": {"name": name_of(checkpoint), "sha256": fingerprint(checkpoint)}}
        if path.is_file():
            if any(json.loads(path.read_text())[key] != value for key, value in identity.items()):
                raise ParetoError(f"{path} is of other data, settings or another model; give another --out")
            continue
        print(f"== {name}", flush=True)
        found = run(load, checkpoint, examples, settings, args.out / ".work" / name, args.device, start)
        where = {"machine": environment.machine(), "versions": environment.versions()}
        write_json(path, {"name": name, **identity, **found, **where})
    show(args.out, list(runs))
    return 0


def show(out: Path, names: list[str]) -> None:
    """Print the figures beside those of 16 bits."""
    found = [json.loads((out / f"{name}.json").read_text()) for name in names]
    whole = found[0]["held_out_loss"]["best"]
    for one in found:
        loss, peak = one["held_out_loss"], one["peak_gpu_bytes"]
        memory = "-" if peak is None else f"{peak / 2**30:.2f} GiB"
        print(
            f"{one['name']:24} loss {loss['before']:.4f} -> {loss['best']:.4f}, "
            f"{loss['best'] / whole - 1:+.2%} beside 16 bits, weights {one['weight_bytes'] / 2**20:.1f} MiB, "
            f"peak {memory}, {one['tokens_per_second'] or 0:,.0f} tokens/s"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ParetoError as error:
        sys.exit(f"finetuning: {error}")
