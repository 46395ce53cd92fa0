"""``pareto compress --backend``: flags and report; the work is in ``run.py``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kv_cache.errors import ParetoError
from quant_methods.backends.environment import BACKENDS

if TYPE_CHECKING:
    from quant_methods.backends.run import BackendReport
    from quant_methods.recipe import Recipe

EPILOG = """\
Other tools, for comparison: --backend llm-compressor, autoawq or autogptq follows the same recipe with that tool's own
algorithm, on the same calibration tokens, in an environment of its own. The first time, --create-environment installs
it (nothing is installed without that flag); later runs use it again.
  pareto compress ref-7m --backend llm-compressor --recipe gptq-w4 --create-environment --out ref-7m-llmc
  pareto compress ref-7m --backend autoawq --backend-python ~/awq/bin/python --out ref-7m-autoawq
"""
# Flags for what only this package does.
OWN_FLAGS = ("search", "upstream", "refit", "kv_scales", "budget", "kv_budget", "sweep", "statistics")


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("other tools")
    group.add_argument(
        "--backend", choices=tuple(BACKENDS), help="let another tool do it: " + ", ".join(BACKENDS) + " (default: ours)"
    )
    group.add_argument(
        "--create-environment", action="store_true", help="install the tool in an environment of its own, if need be"
    )
    group.add_argument("--backend-python", type=Path, metavar="PATH", help="Python of an environment that has the tool")


def check_backend_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        ParetoError: a flag of one side with the other.

    """
    if args.backend is None:
        if args.create_environment or args.backend_python is not None:
            flag = "--create-environment" if args.create_environment else "--backend-python"
            raise ParetoError(f"{flag} is for --backend, one of {', '.join(BACKENDS)}")
        return
    for name in OWN_FLAGS:
        if getattr(args, name):
            raise ParetoError(f"--{name.replace('_', '-')}: {args.backend} has no such thing; leave it out")


def run_backend(args: argparse.Namespace, recipe: Recipe, console: Console) -> int:
    """Run the tool and print what it did; returns the exit status."""
    from quant_methods.backends.run import compress_with

    backend = BACKENDS[args.backend]
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(backend.name, total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, description=what)

        report = compress_with(
            backend,
            args.model,
            dataclasses.replace(recipe, kv_scales=False),
            args.out,
            text=args.text,
            device=args.device,
            python=args.backend_python,
            create_environment=args.create_environment,
            overwrite=args.overwrite,
            progress=show,
        )
    _print_report(console, report)
    return 0


def _print_report(console: Console, report: BackendReport) -> None:
    device = "" if report.peak_device_memory is None else f", {report.peak_device_memory / 1e9:.2f} GB on the device"
    lines = [
        f"checkpoint   {report.out}, written by {report.tool}",
        f"weights      {report.layers} layers at {report.bits_per_weight:.3f} bits a weight as stored"
        + ("" if report.sparsity is None else f", {report.sparsity:.1%} of them zero"),
        f"check        KL {report.divergence:.4f} to the original on a few calibration tokens "
        f"({report.divergence_plain:.4f} without any method)",
        f"size         {report.bytes_before / 1e6:,.1f} MB before, {report.bytes_after / 1e6:,.1f} MB after "
        f"({report.bytes_before / max(1, report.bytes_after):.2f}x)",
        f"time         {report.seconds:.1f} s; peak memory {report.peak_memory / 1e9:.2f} GB{device}",
    ]
    lines += [f"changed      {shim}" for shim in report.shims]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
