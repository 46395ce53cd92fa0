"""What else ``pareto compress`` does: a budget, a sweep, statistics of activations. Flags, progress and tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kv_cache.errors import ParetoError

# Imported when they are used: they load torch, and --help should not.
if TYPE_CHECKING:
    from quant_methods.mixed_precision.budget import Assignment, Budget
    from quant_methods.mixed_precision.kv_budget import KVAssignment, KVBudget
    from quant_methods.mixed_precision.kv_choice import KVChoice
    from quant_methods.mixed_precision.sensitivity import Settings
    from quant_methods.recipe import Recipe
    from quant_methods.report import Report

# Sequences that --statistics looks at unless told otherwise.
STATISTICS_SEQUENCES = 16


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    budget = parser.add_argument_group(
        "mixed precision",
        "Measures what every layer loses at every width, chooses the widths that lose least within\n"
        "a budget (exactly), and compresses so. The measures are left beside the weights:\n"
        "pareto_sensitivity.json and .png.",
    )
    budget.add_argument(
        "--budget",
        metavar="B",
        help="4.25bits (a weight of the linear layers, scales included), or a size: 3.9GB; with a recipe that prunes, "
        "also a share of zeros: 50%%",
    )
    budget.add_argument(
        "--widths",
        nargs="+",
        metavar="W",
        help="to choose from: bits, or bits and group size (default: 3 4 5 6 8 16; e.g. 4g32); "
        "4s50, 16s50: with 50%% zeros (default with a recipe that prunes: 0, 20, 40, 50, 60, 70%% at its bits)",
    )
    budget.add_argument(
        "--sensitivity", choices=("kl", "scaled", "hessian", "owl"), default="kl",
        help="kl: divergence of the model's output with this layer alone quantized (default); scaled: the same at one "
        "width, scaled to the others by the layer's output error, several times faster; hessian: that error alone, "
        "which says little of what the model loses; owl: blocks with more outliers get fewer zeros, for --budget 50%%",
    )  # fmt: skip
    budget.add_argument(
        "--sensitivity-rounding", choices=("nearest", "recipe"), default="nearest",
        help="what rounds while measuring: round-to-nearest (default), or the recipe's method, several times slower",
    )  # fmt: skip
    budget.add_argument("--sensitivity-sequences", type=int, default=4, metavar="N", help="for kl (default: 4)")
    budget.add_argument(
        "--sensitivity-file", type=Path, metavar="FILE", help="an earlier pareto_sensitivity.json, instead of measuring"
    )
    cache = parser.add_argument_group(
        "bits for each layer of the KV cache",
        "Measures what every layer's keys and values lose at 2, 3, 4, 6 and 8 bits, and chooses the\n"
        "bits that lose least within a budget (exactly), for --kv-cache-dtype mixed_per_head. The\n"
        "measures are left beside the weights: pareto_kv_bits.json and .png.",
    )
    cache.add_argument(
        "--kv-budget", metavar="B", help="3.5bits: of a cached element, scales and zeros included, the layers' mean"
    )
    cache.add_argument(
        "--kv-sequences", type=int, metavar="N", help="calibration sequences that losses are measured on (default: 8)"
    )
    sweep = parser.add_argument_group(
        "sweep",
        "Compresses and measures every point of a grid (docs/compression.md shows the file) into\n"
        "OUT/sweep.json, .md and .png. Interrupted? The same command goes on with the first\n"
        "unfinished point.",
    )
    sweep.add_argument("--sweep", type=Path, metavar="GRID", help="YAML file of recipes' settings to combine")
    sweep.add_argument("--keep-checkpoints", action="store_true", help="keep what was measured, in OUT/points")
    statistics = parser.add_argument_group(
        "activation statistics",
        "Ranges, outlier channels and 8-bit rounding errors of every layer's inputs, before and\n"
        "after what the recipe does ahead of the rounding, into OUT/activation_statistics.json, .md\n"
        "and .png. Compresses nothing.",
    )
    statistics.add_argument("--statistics", action="store_true", help="measure activations instead of compressing")
    statistics.add_argument(
        "--outlier-factor", type=float, default=10.0, metavar="K",
        help="a channel is an outlier above K times the median channel's largest (default: 10)",
    )  # fmt: skip
    statistics.add_argument(
        "--percentile", type=float, default=99.99, metavar="P", help="of |x|, that static int8 covers (default: 99.99)"
    )


def budget_of(args: argparse.Namespace) -> Budget | None:
    """Return the budget asked for.

    Raises:
        ParetoError: it cannot be read, or flags that only a budget uses were given without one.

    """
    from quant_methods.mixed_precision.budget import Budget

    if args.budget is not None:
        return Budget.parse(args.budget)
    for flag in ("widths", "sensitivity_file"):
        if getattr(args, flag) is not None:
            raise ParetoError(f"--{flag.replace('_', '-')} is for --budget; give both or neither")
    return None


def kv_bits_of(args: argparse.Namespace, console: Console) -> KVChoice | None:
    """Return what chooses the KV cache's bits, if there is a budget for them.

    Raises:
        ParetoError: the budget cannot be read, or flags were given that do not go together.

    """
    if args.kv_budget is None:
        if args.kv_sequences is not None:
            raise ParetoError("--kv-sequences is for --kv-budget; give both or neither")
        return None
    for mode in ("sweep", "statistics"):
        if getattr(args, mode):
            raise ParetoError(f"--kv-budget does not go with --{mode}, which writes no KV scales; leave it out")
    if args.kv_sequences is not None and args.kv_sequences < 1:
        raise ParetoError(f"--kv-sequences {args.kv_sequences}: at least 1 is needed")
    from quant_methods.mixed_precision.kv_budget import KVBudget
    from quant_methods.mixed_precision.kv_choice import KVChoice
    from quant_methods.mixed_precision.kv_sensitivity import KVSettings

    settings = KVSettings() if args.kv_sequences is None else KVSettings(sequences=args.kv_sequences)
    budget = KVBudget.parse(args.kv_budget)
    return KVChoice(budget, settings, lambda assignment, kl: _print_kv_bits(console, assignment, kl, budget))


def _print_kv_bits(console: Console, assignment: KVAssignment, kl: float, budget: KVBudget) -> None:
    table = Table(title=f"KV bits chosen for {budget.text}", title_justify="left")
    for heading in ("layer", "keys", "values", "loss of keys", "of values"):
        table.add_column(heading, justify="right")
    for index, (found, (key, value)) in enumerate(zip(assignment.losses, assignment.bits, strict=True)):
        losses = (f"{found[kind][bits]:.5f}" for kind, bits in (("key", key), ("value", value)))
        table.add_row(str(index), str(key), str(value), *losses)
    console.print(table)
    others = "; ".join(
        f"{name} {each.predicted:.4f} at {each.bits_per_element:.2f}" for name, each in assignment.uniform().items()
    )
    console.print(
        f"takes        {assignment.bits_per_element:.3f} bits an element, scales and zeros included\n"
        f"loses        KL {kl:.4f} nats a token in the median sequence ({assignment.predicted:.4f} predicted)\n"
        f"predicted    of the other dtypes: {others}",
        highlight=False,
        soft_wrap=True,
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Return how sensitivity is to be measured."""
    from quant_methods.mixed_precision.sensitivity import Settings
    from quant_methods.mixed_precision.units import WIDTHS, Width

    if args.sensitivity_sequences < 1:
        raise ParetoError(f"--sensitivity-sequences {args.sensitivity_sequences}: at least 1 is needed")
    return Settings(
        widths=WIDTHS if args.widths is None else tuple(map(Width.parse, args.widths)),
        kl=args.sensitivity != "hessian",
        scaled=args.sensitivity == "scaled",
        kl_sequences=args.sensitivity_sequences,
        rounding=args.sensitivity_rounding,
    )


def run_budget(
    args: argparse.Namespace, recipe: Recipe, budget: Budget, console: Console, common: dict[str, Any]
) -> tuple[Report, Recipe]:
    """Compress to a budget; print what is chosen before the compression starts."""
    from quant_methods.mixed_precision.mixed import compress_to_budget

    return compress_to_budget(
        args.model,
        recipe,
        budget,
        args.out,
        settings=settings_of(args),
        loss=args.sensitivity if args.sensitivity in ("hessian", "owl") else "kl",
        measured=args.sensitivity_file,
        chosen=lambda assignment: _print_assignment(console, assignment, budget),
        **common,
    )


def _print_assignment(console: Console, assignment: Assignment, budget: Budget) -> None:
    total = sum(assignment.losses)
    table = Table(title=f"widths chosen for {budget.text}", title_justify="left")
    for heading in ("layers", "bits", "bits/weight", "loss", "share"):
        table.add_column(heading, justify="left" if heading == "layers" else "right", no_wrap=heading == "layers")
    for unit, choice, loss in zip(assignment.units, assignment.chosen, assignment.losses, strict=True):
        share = 100 * loss / total if total else 0.0
        stored = choice.stored / unit.weights
        table.add_row(unit.name, choice.width, f"{stored:.3f}", f"{loss:.5f}", f"{share:.1f}%")
    console.print(table)
    counts = ", ".join(f"{count} at {width}" for width, count in assignment.counts().items())
    what = "KL divergence, nats a token" if assignment.loss == "kl" else "sum of relative output errors, squared"
    zeros = f", {assignment.sparsity:.2%} of them zero, if zeros are left out" if assignment.sparsity else ""
    takes = f"takes        {assignment.bits_per_weight:.3f} bits a weight{zeros}, {assignment.size / 1e6:,.1f} MB"
    if assignment.loss == "owl":
        console.print(f"chosen       {counts}\n{takes}", highlight=False, soft_wrap=True)
        return
    console.print(
        f"chosen       {counts} bits\n"
        f"{takes}\n"
        f"predicted    {total:.4f} ({what}, if losses add up and layers round no better than while measuring)",
        highlight=False,
        soft_wrap=True,
    )


def run_sweep(args: argparse.Namespace, console: Console) -> int:
    """Run a sweep; returns the exit status."""
    from quant_methods.overrides import SETTINGS
    from quant_methods.sweeps.file import load_sweep
    from quant_methods.sweeps.sweep import SweepRun, markdown

    given = [name for name in (*SETTINGS, "budget") if getattr(args, name, None) is not None]
    if given or args.statistics:
        flag = given[0] if given else "statistics"
        raise ParetoError(f"--{flag.replace('_', '-')} does not go with --sweep; put it under grid or variants instead")
    if args.sensitivity == "owl":
        raise ParetoError(
            "--sensitivity owl does not go with --sweep, whose budgets are measured; compress with it alone"
        )
    sweep = load_sweep(args.sweep, args.recipe or "gptq-w4")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        points = bar.add_task("points", total=len(sweep.points))
        inner = bar.add_task("", total=None)

        def show(done: int, total: int, point: str, step: int, steps: int, what: str) -> None:
            bar.update(points, completed=done, total=total, description=f"points: {point}")
            bar.update(inner, completed=step, total=steps, description=what or "waiting")

        try:
            run = SweepRun(
                args.model, sweep, args.out, text=args.text, settings=settings_of(args), device=args.device,
                keep=args.keep_checkpoints, overwrite=args.overwrite, progress=show,
            )  # fmt: skip
            rows = run.run()
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on with the first unfinished point")
            raise
    console.print(markdown(rows, run.folder.name), highlight=False, soft_wrap=True)
    console.print(f"results      {args.out}/sweep.json, sweep.md, sweep.png", highlight=False, soft_wrap=True)
    return 0


def run_statistics(args: argparse.Namespace, recipe: Recipe, console: Console) -> int:
    """Measure activations; returns the exit status."""
    from quant_methods.activations.input_statistics import Criteria, markdown
    from quant_methods.activations.run import statistics

    if args.outlier_factor <= 1 or not 50 <= args.percentile <= 100:
        raise ParetoError("--outlier-factor is greater than 1, and --percentile from 50 to 100")
    criteria = Criteria(args.outlier_factor, args.percentile)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("activations", total=None)
        before, after = statistics(
            args.model, recipe, args.out,
            sequences=args.num_calibration_samples or STATISTICS_SEQUENCES, criteria=criteria, text=args.text,
            device=args.device, overwrite=args.overwrite,
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )  # fmt: skip
    console.print(markdown(before, after, criteria), highlight=False, soft_wrap=True)
    console.print(f"results      {args.out}/activation_statistics.json, .md, .png", highlight=False, soft_wrap=True)
    return 0
