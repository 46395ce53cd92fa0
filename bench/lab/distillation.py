"""What distillation gains: a student from scratch against text alone, and a model that learns with KV codes.

``scratch`` trains two students of one shape, from the same random weights and on the same tokens: one on text alone
(CE), one on its teacher too (KD); then each is compressed. ``kv`` holds a model whose KV cache is coded with calibrated
scales against the same after it learnt with those codes. Both are measured on text that no run chose anything by.

    python -m bench.lab.distillation scratch ref-27m --like ref-7m --data train.jsonl --text heldout.jsonl --work DIR \\
        --out scratch.json
    python -m bench.lab.distillation kv ref-27m --bits 3 2 --data train.jsonl --text heldout.jsonl --work DIR \\
        --out kv.json

What is measured is written at once. Stopped? The same command goes on. On a GPU give ``--device cuda``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from bench.environment import environment
from bench.files import write_json
from bench.lab.weight_quality import row
from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.quality import Yardstick, compare, log_probabilities
from quant_methods.compress import compress
from quant_methods.distillation.codes import CodedCache, observe_attention
from quant_methods.distillation.in_memory import load_model
from quant_methods.distillation.job import Job, distill
from quant_methods.distillation.settings import Settings
from quant_methods.model_source import read_config, resolve_model
from quant_methods.recipe_file import load_recipe

SCHEMA = "vllm-pareto/distillation/1"
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def trained(job: Job) -> float:
    """Do a job unless it is done; return the seconds that this took."""
    began = time.monotonic()
    if not job.out.is_dir():
        distill(job, lambda line: print(f"{job.out.name}: {line}", flush=True))
    return time.monotonic() - began


Figures = Iterator[tuple[str, dict[str, Any]]]


def scratch(args: argparse.Namespace, settings: Settings, yardstick: Yardstick) -> Figures:
    """Yield the shape of the students, then the figures of teacher and students, in 16 bits and compressed."""
    shape = args.work / "shape.yaml"
    config = read_config(resolve_model(args.like))
    shape.write_text(yaml.safe_dump({name: config[name] for name in SHAPE if name in config}))
    yield "shape", yaml.safe_load(shape.read_text())
    yield "teacher", row(yardstick.original())
    for name, share in (("ce", 0.0), ("kd", args.kl_share)):
        out = args.work / name
        job = Job(args.model, args.data, out, replace(settings, kl_share=share), shape=shape, device=args.device)
        seconds = trained(job)
        packed = args.work / f"{name}-{args.recipe}"
        if not packed.is_dir():
            compress(str(out), load_recipe(args.recipe), packed, text=args.data, device=args.device)
        yield (
            name,
            {
                "kl_share": share,
                "seconds_of_this_run": seconds,
                "student": row(yardstick.measure(out)[0]),
                args.recipe: row(yardstick.measure(packed)[0]),
            },
        )


def kv(args: argparse.Namespace, settings: Settings, yardstick: Yardstick) -> Figures:
    """Yield, by bits, the figures of the cache with calibrated scales, before and after learning with the codes."""
    calibration = load_sequences(args.model, args.data, 16, settings.length)
    for bits in args.bits:
        out = args.work / f"kv{bits}"
        job = Job(args.model, args.data, out, settings, student=args.model, kv_bits=(bits, bits), device=args.device)
        seconds = trained(job)
        yield (
            str(bits),
            {
                "seconds_of_this_run": seconds,
                "calibrated": coded(args.model, bits, calibration, yardstick, args.device),
                "learnt": coded(out, bits, calibration, yardstick, args.device),
                "learnt, cache in 16 bits": row(yardstick.measure(out)[0]),
            },
        )


def coded(folder: Path, bits: int, calibration: Tensor, yardstick: Yardstick, device: str) -> dict[str, Any]:
    """Return the figures of a model that reads its KV cache from codes, with scales calibrated on it.

    ``energy_lost`` is the share of the squares of keys and values, as they are coded, that rounding takes: its mean
    over tokens, heads, keys and values.
    """
    cache = CodedCache((bits, bits), folder, calibration, 0, device)
    lost: list[float] = []
    for codes in cache.codes:
        if codes is not None:
            codes.read_back = watched(codes.read_back, lost)
    model = load_model(folder, device).eval()
    observe_attention(model)

    def tested() -> Iterator[Tensor]:
        for window in yardstick.windows:
            with cache.on():
                yield log_probabilities(model, window)

    found = row(compare(tested(), yardstick.windows, yardstick.base))
    return found | {"energy_lost": statistics.fmean(lost)}


def watched(read_back: Callable[[Tensor, int], Tensor], lost: list[float]) -> Callable[[Tensor, int], Tensor]:
    """Return a way to read codes back that notes the mean share of the squares of what is coded that rounding takes."""

    def read(even: Tensor, bits: int) -> Tensor:
        found = read_back(even, bits)
        lost.append(float(((found - even).square().sum(-1) / even.square().sum(-1).clamp_min(1e-12)).mean()))
        return found

    return read


def main(argv: list[str] | None = None) -> int:
    """Train, measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scratch", "kv"))
    parser.add_argument("model", help="the teacher: embedded name, folder, or hub name")
    parser.add_argument("--data", type=Path, required=True, help="what students learn on")
    parser.add_argument("--text", type=Path, required=True, help="what they are measured on: another file")
    parser.add_argument("--like", default="ref-7m", help="scratch: whose shape students have (default: %(default)s)")
    parser.add_argument("--kl-share", type=float, default=0.9, help="scratch: of KD's loss (default: %(default)s)")
    parser.add_argument("--recipe", default="gptq-w4-g32", help="scratch: of the compression (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2], help="kv: of codes (default: 3 2)")
    parser.add_argument("--samples", type=int, default=4096, help="sequences to learn on (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="(default: scratch 1e-3, kv 1e-4)")
    parser.add_argument("--targets", nargs="+", default=[], help="layers that learn, as k_proj v_proj (default: all)")
    parser.add_argument("--looks", type=int, default=10, help="at held-out text (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="of text to measure on (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="folder of the students; is kept")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    args = parser.parse_args(argv)
    try:
        args.model = resolve_model(args.model)
        args.work.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            samples=args.samples,
            held_out=min(32, max(8, args.samples // 16)),
            length=args.length,
            epochs=args.epochs,
            batch=args.batch,
            micro_batch=min(args.batch, 8),
            learning_rate=args.learning_rate or (1e-3 if args.what == "scratch" else 1e-4),
            weight_decay=0.1 if args.what == "scratch" else 0.0,
            kl_share=1.0,
            looks=args.looks,
            targets=tuple(args.targets),
        )
        windows = load_sequences(args.model, args.text, args.windows, args.length, split="evaluation")
        yardstick = Yardstick(args.model, windows, args.device)
        told = {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "arguments": told | {"model": args.model.name},
            "settings": asdict(settings),
            "tokens": args.samples * args.length,
            "environment": environment(),
            "results": {},
        }
        for name, figures in (scratch if args.what == "scratch" else kv)(args, settings, yardstick):
            document["results"][name] = figures
            write_json(args.out, document)
    except ParetoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
