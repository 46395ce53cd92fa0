"""``pareto compress``: flags, progress bar and report; the work is in ``compress.py``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kv_cache.errors import ParetoError
from kv_cache.formats import MIXED
from kv_cache.terminal import console as plain_console
from quant_methods.backends.command import EPILOG, add_backend_arguments, check_backend_arguments, run_backend
from quant_methods.backends.environment import BACKENDS
from quant_methods.command_modes import add_modes, budget_of, kv_bits_of, run_budget, run_statistics, run_sweep
from quant_methods.exempt import NAMES
from quant_methods.fused import is_expert
from quant_methods.progress import Lines
from quant_methods.threads import wait_asleep

if TYPE_CHECKING:
    from quant_methods.recipe import Recipe
    from quant_methods.report import Report

HELP = "write a compressed checkpoint that vLLM serves"
USER_ERRORS = (ParetoError,)
DESCRIPTION = """\
Compress a Hugging Face model: its linear layers' weights to 2 to 8 bits, and scales for a quantized KV cache.

A recipe says how: a built-in one (pareto compress --list-recipes) or a YAML file. Flags override its settings. The
result is a checkpoint with its recipe in pareto_recipe.json: compressed-tensors, which stock vLLM serves, where that
can express it (4 and 8 bits); else a format that vLLM serves where this package is installed.

examples:
  pareto compress ref-7m --recipe gptq-w4 --out ref-7m-w4
  pareto compress Qwen/Qwen3-0.6B --recipe gptq-w4-g32 --text calibration.jsonl --device cuda --out qwen-w4
  pareto compress ref-7m --recipe gptq-w4 --group-size 64 --symmetric --verbose --out ref-7m-w4-g64
  pareto compress ref-7m --recipe kv-scales --out ref-7m-kv        (weights as they are, KV scales added)
  pareto compress ref-7m --budget 4.25bits --text calibration.jsonl --out ref-7m-mixed     (finds each layer's bits)
  pareto compress ref-7m --recipe kv-scales --kv-budget 3.5bits --out ref-7m-kv   (finds each layer's KV bits)
  pareto compress ref-7m --sweep grid.yaml --text calibration.jsonl --out sweep            (many recipes, one table)
  pareto compress ref-7m --statistics --recipe smoothquant-w8a8 --out statistics           (outliers, before and after)

Calibration runs on --text: a .txt file, or .jsonl with a "text" field or with "messages", which the model's chat
template writes out. Without it, weights are calibrated on text that the model writes itself from a fixed seed, KV
scales alone on a short text that ships with this package. Layers run one
block at a time, so the model need not fit in memory. KV scales can be made for checkpoints that are quantized already.

Interrupted? The same command goes on from the first unfinished block and writes the same bytes.

A recipe file:
  description: 4-bit GPTQ, down_proj left alone
  ignore: [lm_head, down_proj]          # globs over module names
  calibration: {num_samples: 128, length: 1024, seed: 0}
  kv_scales: true
  exempt: [first, last]                 # parts of the model by name, see --exempt
  steps:
    - {method: awq}                     # optional: rotate, smoothquant or awq before the rounding
    - {method: gptq, bits: 4, group_size: 128, symmetric: false, act_order: true}
    - {method: tune}                    # optional, last: trains scales and norms by gradient; best on a GPU

"""
DESCRIPTION += EPILOG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    switch = argparse.BooleanOptionalAction
    parser.add_argument("model", nargs="?", default="ref-7m", help="directory, hub name, or ref-7m (the default)")
    parser.add_argument("--recipe", help="built-in name or YAML file (default: gptq-w4; awq-w4 with --backend autoawq)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the checkpoint")
    parser.add_argument("--text", type=Path, metavar="FILE", help="calibration text: .txt, or .jsonl with a text field")
    parser.add_argument("--list-recipes", action="store_true", help="list the built-in recipes and exit")
    parser.add_argument("--overwrite", action="store_true", help="replace our checkpoint in DIR, or another run")
    parser.add_argument("--verbose", action="store_true", help="print the error of every layer")
    parser.add_argument(
        "--device", help="torch device for the arithmetic (default: cpu; for KV scales alone cuda where there is one)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model from the hub")
    recipe = parser.add_argument_group("overrides of the recipe")
    recipe.add_argument("--bits", type=int, help="2 to 8; stock vLLM serves 4 and 8")
    recipe.add_argument("--group-size", type=int, help="32, 64, 128, or -1 for one scale per channel")
    recipe.add_argument(
        "--group-size-fallback",
        choices=("lower", "skip", "refuse"),
        help="where the group size does not divide a layer's width: take the largest that does (the default), leave "
        "the layer at 16 bits, or refuse",
    )
    recipe.add_argument("--per-tensor", action=switch, default=None, help="one scale a weight, with --group-size -1")
    recipe.add_argument("--symmetric", action=switch, default=None, help="without zero-points")
    recipe.add_argument("--act-order", action=switch, default=None, help="GPTQ: largest activations first")
    recipe.add_argument(
        "--activations",
        choices=("none", "int8", "int6", "int8_static"),
        help="precision of activations at serving time, scales per token or (static) calibrated",
    )
    recipe.add_argument("--search", choices=("minmax", "mse", "output"), help="how each group's range is chosen")
    recipe.add_argument("--damping", type=float, help="GPTQ: fraction of the mean diagonal added to the Hessian")
    recipe.add_argument(
        "--upstream-damping",
        type=float,
        help="the same of what --upstream solves for (1); with less, little calibration data is fitted too closely",
    )
    recipe.add_argument("--alpha", type=float, help="SmoothQuant: one for all layers (default: searched)")
    recipe.add_argument("--upstream", action=switch, default=None, help="GPTQ: make up for earlier layers' error")
    recipe.add_argument("--outliers", type=float, metavar="FRACTION", help="input channels kept in 16 bits; 0: none")
    recipe.add_argument(
        "--outlier-handling", action=switch, default=None, help="--no-...: drop rotate, smoothquant, awq; --outliers 0"
    )
    recipe.add_argument("--rank", type=int, help="of a product that makes up for the error")
    recipe.add_argument("--sparse", type=float, metavar="FRACTION", help="SqueezeLLM: weights to keep in 16 bits")
    recipe.add_argument("--sparsity", type=float, metavar="FRACTION", help="of weights to prune, in recipes that prune")
    recipe.add_argument("--pattern", metavar="P", help="which: any, or N:M (2:4), to keep N of M neighbouring inputs'")
    recipe.add_argument("--refit", action=switch, default=None, help="after pruning, fit the weights that are left")
    recipe.add_argument(
        "--store",
        choices=("dense", "2:4", "bitmap"),
        help="of pruned weights in 4 bits: zeros are codes too, or left out (2:4 for that pattern, bitmap for any)",
    )
    recipe.add_argument("--train-steps", type=int, metavar="N", help="of recover and movement, which train weights")
    recipe.add_argument("--train-samples", type=int, metavar="N", help="sequences that these and tune learn on")
    recipe.add_argument("--train-length", type=int, metavar="TOKENS", help="tokens in each of these")
    recipe.add_argument("--learning-rate", type=float, help="of the steps that train a whole model, see their sections")
    recipe.add_argument(
        "--loss", choices=("kl", "text"), help="of recover and movement: the original's outputs, or text"
    )
    recipe.add_argument("--lora", type=int, metavar="RANK", help="recover: train products of this rank; 0: all weights")
    recipe.add_argument("--epochs", type=int, help="OmniQuant: passes over the calibration set")
    recipe.add_argument("--ignore", nargs="+", metavar="GLOB", help="modules to leave alone")
    recipe.add_argument("--exempt", nargs="+", metavar="PART", help=f"parts to leave alone: {', '.join(NAMES)}")
    recipe.add_argument("--num-calibration-samples", type=int, metavar="N", help="sequences")
    recipe.add_argument("--calibration-length", type=int, metavar="TOKENS", help="tokens in each sequence")
    recipe.add_argument("--seed", type=int, help="seed of sampling and of the KV calibration")
    recipe.add_argument("--kv-scales", action=switch, default=None, help="calibrate KV-cache scales in the same pass")
    add_modes(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    console = plain_console()
    if args.list_recipes:
        console.print(_recipes_table())
        return 0
    if args.out is None:
        raise ParetoError("--out DIR is missing: where to write the checkpoint")
    check_backend_arguments(args)
    # transformers' own progress bars and notices would tear the one below.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    wait_asleep(turns=10_000)
    kv_bits = kv_bits_of(args, console)
    from quant_methods.compress import compress, default_device
    from quant_methods.model_source import resolve_model
    from quant_methods.overrides import override
    from quant_methods.recipe_file import load_recipe

    if args.revision is not None:
        args.model = str(resolve_model(args.model, quantized=True, revision=args.revision))
    if args.sweep is not None:
        args.device = args.device or "cpu"
        return run_sweep(args, console)
    default = "gptq-w4" if args.backend is None else BACKENDS[args.backend].recipe
    recipe = override(load_recipe(args.recipe or default), vars(args))
    args.device = args.device or default_device(recipe)
    if args.backend is not None:
        return run_backend(args, recipe, console)
    if args.statistics:
        return run_statistics(args, recipe, console)
    budget = budget_of(args)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}", markup=False),
    )
    with (
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar,
        Lines(
            recipe.name, lambda line: None if console.is_terminal else print(line, flush=True), milestones=True
        ) as lines,
    ):
        task = bar.add_task(f"{recipe.name}", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{recipe.name}: {what}")
            lines.show(done, total, what)

        try:
            common: dict[str, Any] = {
                "text": args.text,
                "device": args.device,
                "overwrite": args.overwrite,
                "progress": show,
                "kv_bits": kv_bits,
                "say": lambda line: console.print(f"note: {line}", highlight=False, soft_wrap=True),
            }
            if budget is None:
                report = compress(args.model, recipe, args.out, **common)
            else:
                report, recipe = run_budget(args, recipe, budget, console, common)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from the last finished block")
            raise
    _print_report(console, report, recipe, dtype="int4_per_head" if kv_bits is None else MIXED, verbose=args.verbose)
    return 0


def _recipes_table() -> Table:
    from quant_methods.recipe_file import built_in_recipes, load_recipe
    from quant_methods.stock_vllm import Serving

    table = Table(title="built-in recipes", title_justify="left")
    for heading in ("recipe", "what it does", "served by"):
        table.add_column(heading)
    for name in built_in_recipes():
        recipe = load_recipe(name)
        serving = Serving.of(recipe.rounding)
        table.add_row(name, recipe.description, str(serving))
    return table


def _print_report(console: Console, report: Report, recipe: Recipe, *, dtype: str, verbose: bool) -> None:
    if verbose and report.layers:
        table = Table(title="relative output error of each layer", title_justify="left")
        pruned = report.sparsity is not None
        for heading in ("layer", "shape", "bits/weight", "error", *(("zeros",) if pruned else ())):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for layer in report.layers:
            shape = "x".join(map(str, layer.shape))
            row = [layer.name, shape, f"{layer.bits_per_weight:.3f}", f"{layer.relative_error:.4f}"]
            if pruned:
                row.append("" if layer.sparsity is None else f"{layer.sparsity:.2%}")
            table.add_row(*row)
        console.print(table)
    lines = [f"checkpoint   {report.out}"]
    if report.layers:
        mean = sum(layer.relative_error for layer in report.layers) / len(report.layers)
        worst = max(report.layers, key=lambda layer: layer.relative_error)
        lines += [
            f"weights      {len(report.layers)} layers at {report.bits_per_weight:.3f} bits a weight, scales included",
            f"error        {mean:.4f} mean relative, {worst.relative_error:.4f} worst ({worst.name})",
        ]
    if report.sparsity is not None:
        own = sorted((layer.sparsity, layer.name) for layer in report.layers if layer.sparsity is not None)
        ends = " to ".join(f"{sparsity:.2%} ({name})" for sparsity, name in (own[0], own[-1]))
        lines.append(f"zeros        {report.sparsity:.2%} of the pruned layers' weights, as they are stored; {ends}")
    for name, tuned in (("trained", report.trained), ("tuned", report.tuned)):
        if tuned is not None:
            what = "loss" if tuned.on_text else "KL to the original"
            lines.append(
                f"{name:<13}{what} on held-out text {tuned.before:.4f} before, {tuned.after:.4f} after {tuned.kept} "
                "steps"
            )
    lines.append(
        f"size         {report.bytes_before / 1e6:,.1f} MB before, {report.bytes_after / 1e6:,.1f} MB after "
        f"({report.bytes_before / max(1, report.bytes_after):.2f}x)"
    )
    if report.kv_scales:
        lines.append(f"KV scales    calibrated; serve with --kv-cache-dtype {dtype} (or another per-head dtype)")
    resumed = f", resumed after {report.resumed_blocks} finished blocks" if report.resumed_blocks else ""
    lines.append(f"time         {report.seconds:.1f} s{resumed}; peak memory {report.peak_memory / 1e9:.2f} GB")
    lines.append(f"served by    {report.serving}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if report.unseen:
        console.print(
            f"note: no calibration token was sent to {len(report.unseen)} experts ({report.unseen[0]} is one): they "
            "were rounded without calibration; give more --text or --num-calibration-samples",
            highlight=False,
            soft_wrap=True,
        )
    if "cpu" not in report.serving.devices:
        note = "vLLM has no CPU kernel for 8-bit weights with 16-bit activations; for CPUs use rtn-w8 or gptq-w8"
        if any(is_expert(layer.name) for layer in report.layers):
            note = "vLLM serves quantized experts on CUDA; for CPUs leave them at 16 bits: --ignore '*.experts.*'"
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if report.serving.plugin:
        console.print(
            "note: serve it where vllm-pareto is installed; stock vLLM does not know its format", soft_wrap=True
        )
