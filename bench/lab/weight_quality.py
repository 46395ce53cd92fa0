"""Compares compressed checkpoints with their original in float32 PyTorch: KL divergence, top-1 agreement, perplexity.

Fast, and free of an engine's own rounding: for choosing between recipes. ``pareto eval`` measures what is served.

    python -m bench.lab.weight_quality ref-27m out/w4 out/w8a8 --text heldout.jsonl --out results/weights/quality.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress, track

from bench.environment import environment
from bench.files import write_json
from bench.statistics import exp_estimate, mean_estimate
from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.quality import Quality, Yardstick
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.model_source import resolve_model

SCHEMA = "vllm-pareto/weight-quality/1"


def row(quality: Quality) -> dict[str, Any]:
    """Return KL(original || tested) in nats a token, top-1 agreement and perplexity, each with its uncertainty."""
    return {
        "kl": asdict(mean_estimate(quality.kl)),
        "top1_agreement": asdict(mean_estimate(quality.top1)),
        "perplexity": asdict(exp_estimate(mean_estimate(quality.loss))),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the original: embedded name, folder, or hub name")
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="compressed-tensors checkpoints"
    )
    parser.add_argument("--text", type=Path, help=".txt or .jsonl (default: the model's samples)")
    parser.add_argument("--num-windows", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--window-tokens", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    args = parser.parse_args(argv)
    try:
        folder = resolve_model(args.model)
        windows = load_sequences(folder, args.text, args.num_windows, args.window_tokens, split="evaluation")
        with Progress(transient=True) as bar:
            task = bar.add_task(folder.name)
            yardstick = Yardstick(
                folder, windows, args.device, lambda done, total: bar.update(task, completed=done, total=total)
            )
        rows = [{"checkpoint": folder.name, "bits": 16.0, **row(yardstick.original())}]
        for checkpoint in track(args.checkpoints, description="checkpoints"):
            quality, bits = yardstick.measure(checkpoint)
            recipe = checkpoint / RECIPE_FILE
            made = json.loads(recipe.read_text()) if recipe.is_file() else {}
            rows.append(
                {
                    "checkpoint": checkpoint.name,
                    "recipe": made.get("recipe"),
                    "calibration": made.get("calibration"),
                    "bits": bits,
                    **row(quality),
                }
            )
            document = {
                "schema": SCHEMA,
                "model": folder.name,
                "text": args.text.name if args.text else "samples",
                "num_windows": args.num_windows,
                "window_tokens": args.window_tokens,
                "environment": environment(),
                "rows": rows,
            }
            write_json(args.out, document)
    except ParetoError as error:
        print(f"weight_quality: error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| checkpoint | bits a weight | KL | top-1 | perplexity |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['checkpoint']} | {row['bits']:.3f} | {row['kl']['value']:.4f} | "
        f"{row['top1_agreement']['value']:.3f} | {row['perplexity']['value']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
