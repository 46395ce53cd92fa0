"""Compares compressed checkpoints with their original in float32 PyTorch: KL divergence, top-1 agreement, perplexity.

Fast, and free of an engine's own rounding: for choosing between recipes. ``pareto eval`` measures what is served.

    python -m bench.weight_quality ref-27m out/w4 out/w8a8 --text heldout.jsonl --out results/weights/quality.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from bench.environment import environment
from bench.estimates import exp_estimate, mean_estimate
from bench.files import write_json
from kv_cache.errors import ParetoError
from quant_methods.checkpoint import Source
from quant_methods.model_source import resolve_model
from quant_methods.reference import load_reference
from quant_methods.text_source import load_sequences

SCHEMA = "vllm-pareto/weight-quality/1"


@torch.no_grad()
def log_probabilities(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Return float32 [tokens - 1, vocabulary] of a window [tokens], on the CPU."""
    device = next(model.parameters()).device
    return model(window[None].to(device)).logits[0, :-1].float().log_softmax(-1).cpu()


def compare(tested: Iterable[torch.Tensor], windows: torch.Tensor, base: list[torch.Tensor]) -> dict[str, Any]:
    """Return KL(base || tested) in nats a token, top-1 agreement and perplexity, of log-probabilities of windows."""
    divergence, agreement, loss = [], [], []
    for found, window, expected in zip(tested, windows, base, strict=True):
        divergence.append((expected.exp() * (expected - found)).sum(-1).mean().item())
        agreement.append((expected.argmax(-1) == found.argmax(-1)).float().mean().item())
        loss.append(-found.gather(-1, window[1:, None]).mean().item())
    return {
        "kl": asdict(mean_estimate(divergence)),
        "top1_agreement": asdict(mean_estimate(agreement)),
        "perplexity": asdict(exp_estimate(mean_estimate(loss))),
    }


def stored_bits(checkpoint: Path, model: Any) -> float:
    """Return the bits that a checkpoint stores for each weight of the linear layers inside its blocks."""
    linears = {
        name: module.weight.numel()
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    prefix = next(name for name, module in model.named_modules() if module is model.get_decoder())
    stored = 0
    for name, (_, entry) in Source(checkpoint).entries.items():
        module, _, part = name.removeprefix(prefix + ".").rpartition(".")
        if module in linears and part not in ("bias", "weight_shape"):
            stored += entry["data_offsets"][1] - entry["data_offsets"][0]
    return 8 * stored / sum(linears.values())


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
        original = load_reference(folder, args.device)
        windows = load_sequences(folder, args.text, args.num_windows, args.window_tokens, split="evaluation")
        base = [log_probabilities(original, window) for window in track(windows, description=folder.name)]
        rows = [{"checkpoint": folder.name, "bits": 16.0, **compare(base, windows, base)}]
        for checkpoint in track(args.checkpoints, description="checkpoints"):
            model = load_reference(checkpoint, args.device)
            recipe = checkpoint / "pareto_recipe.json"
            made = json.loads(recipe.read_text()) if recipe.is_file() else {}
            rows.append(
                {
                    "checkpoint": checkpoint.name,
                    "recipe": made.get("recipe"),
                    "calibration": made.get("calibration"),
                    "bits": stored_bits(checkpoint, model),
                    **compare((log_probabilities(model, window) for window in windows), windows, base),
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
