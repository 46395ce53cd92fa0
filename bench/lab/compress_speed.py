"""Time and memory of compressing a model of a given shape, whose weights are random, beside another tool.

The checkpoint is written first, in bfloat16, and does not count; everything from reading it to the finished compressed
checkpoint does, calibration text included. Random weights cost what trained ones do: nothing here looks at values.
With --blocks the model is cut to its first blocks; lines of other tools may be cut shorter (--backend-blocks), since
their time grows with the number of blocks too. Each line runs in a process of its own.

    python -m bench.lab.compress_speed bench/shapes/mistral-7b --tokenizer ref-7m --text calibration.jsonl \\
        --device cuda --lines pareto:rtn-w4 pareto:gptq-w4 pareto:awq-w4 llm-compressor:gptq-w4 --backend-blocks 2 \\
        --backend-python llm-compressor=~/llmc/bin/python --out results/gpu-compress-speed
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file

from bench.environment import environment
from bench.files import read_json, write_json, write_text
from bench.lab.compare_compressors import OURS, Line, make, pythons
from kv_cache.errors import ParetoError
from quant_methods.model_source import INDEX, read_config, resolve_model
from quant_methods.recipe_file import load_recipe

SCHEMA = "vllm-pareto/compress-speed/1"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SPREAD = 0.02
"""Standard deviation of the random weights: that of most models' initialization."""


def write_random(shape: Path, tokenizer: Path, blocks: int, out: Path, device: str) -> None:
    """Write a checkpoint with random weights, a file a block, unless it is there.

    Args:
        shape: folder with config.json.
        tokenizer: folder with tokenizer.json.
        blocks: how many.
        out: folder to write.
        device: where random numbers are drawn.

    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = read_config(shape) | {"num_hidden_layers": blocks}
    if out.is_dir() and read_json(out / "config.json") == config:
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, out / name)
    (out / "partial.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.state_dict().items():
        block = next((part for part in name.split(".") if part.isdigit()), "outside")
        files.setdefault(f"model-{block:0>5}.safetensors", {})[name] = parameter
    for file, tensors in files.items():
        for name, parameter in tensors.items():
            norm = parameter.dim() == 1
            made = torch.ones(parameter.shape) if norm else torch.randn(parameter.shape, device=device) * SPREAD
            tensors[name] = made.to("cpu", torch.bfloat16)
            weight_map[name] = file
        save_file(tensors, out / file, metadata={"format": "pt"})
        tensors.clear()
    write_json(out / INDEX, {"metadata": {}, "weight_map": weight_map})
    # Last, as the mark of a whole checkpoint.
    write_json(out / "config.json", config)
    (out / "partial.json").unlink()


def measure(line: Line, args: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    """Compress once and return what it cost."""
    config = read_config(args.shape)
    whole = args.blocks or config["num_hidden_layers"]
    blocks = whole if line.tool == OURS else min(args.backend_blocks or whole, whole)
    model = args.work / f"random-{blocks}"
    task = bar.add_task(f"{line.slug}: writing random weights", total=None)
    write_random(args.shape, resolve_model(args.tokenizer), blocks, model, args.device)
    recipe = load_recipe(line.recipe)
    calibration = dataclasses.replace(recipe.calibration, num_samples=args.num_sequences, length=args.length)
    recipe = dataclasses.replace(recipe, calibration=calibration, kv_scales=False)
    out = args.work / line.slug
    cost = make(
        line, model, recipe, out, text=args.text, device=args.device,
        python=pythons(args.backend_python).get(line.tool),
        progress=lambda done, total, what: bar.update(task, completed=done, total=total or None, description=what),
    )  # fmt: skip
    bar.remove_task(task)
    shutil.rmtree(out)
    settings = {
        "tool": line.tool, "recipe": recipe.to_dict(), "shape": args.shape.name, "blocks": blocks, "of": whole,
        "num_sequences": args.num_sequences, "length": args.length, "device": args.device,
    }  # fmt: skip
    return {"schema": SCHEMA, "settings": settings, "environment": environment(), "cost": cost}


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| recipe | tool | blocks | seconds | seconds a block | device memory, GB | memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        settings, cost = result["settings"], result["cost"]
        device = cost["peak_device_memory"]
        lines.append(
            f"| {settings['recipe']['name']} | {settings['tool']} | {settings['blocks']} of {settings['of']} | "
            f"{cost['seconds']:.1f} | {cost['seconds'] / settings['blocks']:.2f} | "
            f"{f'{device / 1e9:.1f}' if device else ''} | {cost['peak_memory'] / 1e9:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write JSON, a file a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path, help="folder with a config.json")
    parser.add_argument("--lines", nargs="+", metavar="TOOL:RECIPE", required=True)
    parser.add_argument("--tokenizer", default="ref-7m", help="model whose tokenizer reads the text (%(default)s)")
    parser.add_argument("--text", type=Path, required=True, help="calibration text, .txt or .jsonl")
    parser.add_argument("--num-sequences", type=int, default=128, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens in each (default: %(default)s)")
    parser.add_argument("--blocks", type=int, help="cut the model to so many blocks (default: all)")
    parser.add_argument("--backend-blocks", type=int, help="likewise, for other tools (default: as --blocks)")
    parser.add_argument("--backend-python", nargs="+", default=[], metavar="TOOL=PATH")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("compress-speed-work"), metavar="DIR", help="for checkpoints (%(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    args = parser.parse_args(argv)
    failed, results = [], []
    try:
        lines = [Line.parse(text) for text in args.lines]
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, transient=True) as bar:
            for line in lines:
                try:
                    results.append(measure(line, args, bar))
                    write_json(args.out / f"{line.slug}.json", results[-1])
                except ParetoError as error:
                    failed.append(f"{line.tool}:{line.recipe}: {error}")
        if results:
            write_text(args.out / "table.md", table(results))
            print(table(results), end="")
    except ParetoError as error:
        failed.append(str(error))
    for reason in failed:
        print(f"compress_speed: error: {reason}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
