"""Compares compression tools side by side: the same model, recipe and calibration tokens, each tool's own algorithm.

Measures what each checkpoint costs in quality (KL divergence to the original, top-1 agreement and perplexity over
held-out text, in float32 PyTorch), and what making it cost (seconds, peak memory). Each line is TOOL:RECIPE, the tool
being ours (`pareto`) or a backend of `pareto compress --backend`; its result is a file of its own in --out, so that an
interrupted comparison goes on where it stopped and lines can be added one at a time. The table (table.md) and the plot
(kl.png) show all results in --out that were measured with the same settings.

    python -m bench.lab.compare_compressors ref-27m --text calibration.jsonl --heldout heldout.jsonl \\
        --backend-python llm-compressor=~/llmc/bin/python --out results/compare-compressors-ref-27m
    python -m bench.lab.compare_compressors ref-27m --text calibration.jsonl --heldout heldout.jsonl \\
        --lines pareto:gptq-w4 llm-compressor:gptq-w4 --num-sequences 16 --out quick
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import re
import resource
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.environment import environment
from bench.files import read_json, write_json, write_text
from bench.lab.weight_quality import row
from kv_cache.errors import ParetoError
from quant_methods.backends.environment import BACKENDS
from quant_methods.backends.run import compress_with
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.quality import Yardstick
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.compress import compress
from quant_methods.model_source import fingerprint, resolve_model
from quant_methods.recipe import Recipe
from quant_methods.recipe_file import load_recipe

SCHEMA = "vllm-pareto/compare-compressors/1"
OURS = "pareto"
LINES = (
    "pareto:rtn-w4", "llm-compressor:rtn-w4",
    "pareto:gptq-w4-sym", "llm-compressor:gptq-w4-sym", "autogptq:gptq-w4-sym",
    "pareto:gptq-w4", "llm-compressor:gptq-w4",
    "pareto:awq-w4", "llm-compressor:awq-w4", "autoawq:awq-w4",
    "pareto:smoothquant-w8a8", "llm-compressor:smoothquant-w8a8",
    "pareto:gptq-w3", "llm-compressor:gptq-w3",
)  # fmt: skip
COLOURS = {OURS: "#1f77b4", "llm-compressor": "#ff7f0e", "autogptq": "#2ca02c", "autoawq": "#9467bd"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the comparison.

    Attributes:
        tool: ``pareto`` or a backend's name.
        recipe: built-in name or YAML file.

    """

    tool: str
    recipe: str

    @classmethod
    def parse(cls, text: str) -> Line:
        """Read ``TOOL:RECIPE``.

        Raises:
            ParetoError: it is none, or the tool is unknown.

        """
        tool, colon, recipe = text.partition(":")
        if not colon or not recipe:
            raise ParetoError(f"--lines {text}: expected TOOL:RECIPE, such as {LINES[1]}")
        if tool != OURS and tool not in BACKENDS:
            raise ParetoError(f"--lines {text}: unknown tool {tool!r}; tools: {', '.join((OURS, *BACKENDS))}")
        return cls(tool, recipe)

    @property
    def slug(self) -> str:
        """What its files are called."""
        return f"{self.tool}--{re.sub(r'[^A-Za-z0-9_.-]+', '-', Path(self.recipe).stem)}"


def make_ours(model: str, recipe: Recipe, out: str, text: str | None, device: str) -> dict[str, Any]:
    """Compress with this package, in this process, and return what it cost."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    report = compress(model, recipe, out, text=text, device=device, overwrite=True)
    return {
        "seconds": report.seconds,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_memory": torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else None,
        "versions": environment()["versions"],
        "shims": [],
    }


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what a function returns in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make(
    line: Line,
    model: Path,
    recipe: Recipe,
    checkpoint: Path,
    *,
    text: Path | None,
    device: str,
    python: Path | None,
    create_environment: bool = False,
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Let a line's tool write a checkpoint, in a process of its own, and return what it cost."""
    if line.tool == OURS:
        progress(0, 0, f"{line.tool} {recipe.name}")
        given = str(text) if text else None
        return in_own_process(make_ours, str(model), recipe, str(checkpoint), given, device)
    report = compress_with(
        BACKENDS[line.tool], model, recipe, checkpoint, text=text, device=device, python=python,
        create_environment=create_environment, overwrite=True, progress=progress,
    )  # fmt: skip
    made = read_json(checkpoint / RECIPE_FILE)
    assert made is not None
    fields = ("seconds", "peak_memory", "peak_device_memory", "shims")
    return {name: getattr(report, name) for name in fields} | {"versions": made["backend"]["versions"]}


class Comparison:
    """A comparison with its settings; makes and measures one line at a time."""

    def __init__(self, args: argparse.Namespace, bar: Progress) -> None:
        self.args, self.bar = args, bar
        self.task = bar.add_task("reading", total=None)
        self.folder = resolve_model(args.model)
        self.pythons = pythons(args.backend_python)
        shape = (args.num_sequences, args.length)
        tokens = load_sequences(self.folder, args.text, *shape, device=args.device, progress=self._show)
        self.settings = {
            "model": self.folder.name,
            "model_sha256": fingerprint(self.folder),
            "calibration_tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "num_sequences": args.num_sequences,
            "length": args.length,
            "heldout": args.heldout.name,
            "num_windows": args.num_windows,
            "window_tokens": args.window_tokens,
            "device": torch.device(args.device).type,
        }
        self.windows = load_sequences(
            self.folder, args.heldout, args.num_windows, args.window_tokens, split="evaluation"
        )
        self.yardstick: Yardstick | None = None

    def _show(self, done: int, total: int, what: str = "sampling text") -> None:
        self.bar.update(self.task, completed=done, total=total or None, description=what)

    def run(self, line: Line) -> None:
        """Write a line's result, unless it is there."""
        recipe = self._recipe(line)
        # As JSON has it: lists for tuples.
        settings = json.loads(json.dumps(self.settings | {"tool": line.tool, "recipe": recipe.to_dict()}))
        file = self.args.out / f"{line.slug}.json"
        found = read_json(file)
        if found and found.get("settings") == settings and not self.args.again:
            return
        checkpoint = self.args.checkpoints / line.slug
        cost = self._make(line, recipe, checkpoint)
        result = {
            "schema": SCHEMA, "settings": settings, "environment": environment(), "cost": cost,
            **self._measure(checkpoint, line),
        }  # fmt: skip
        write_json(file, result)
        if not self.args.keep:
            shutil.rmtree(checkpoint)

    def results(self) -> list[dict[str, Any]]:
        """Return all results in --out that were measured with these settings, recipes together, the best first."""
        found = [read_json(file) for file in sorted(self.args.out.glob("*--*.json"))]
        fitting = [
            dict(result) for result in found if result and self.settings.items() <= result.get("settings", {}).items()
        ]
        order = [text.partition(":")[2] for text in LINES]

        def place(result: dict[str, Any]) -> tuple[int, str, float]:
            name = result["settings"]["recipe"]["name"]
            return order.index(name) if name in order else len(order), name, result["kl"]["value"]

        return sorted(fitting, key=place)

    def _recipe(self, line: Line) -> Recipe:
        recipe = load_recipe(line.recipe)
        calibration = dataclasses.replace(
            recipe.calibration, num_samples=self.args.num_sequences, length=self.args.length
        )
        return dataclasses.replace(recipe, calibration=calibration, kv_scales=False)

    def _make(self, line: Line, recipe: Recipe, checkpoint: Path) -> dict[str, Any]:
        args = self.args
        args.checkpoints.mkdir(parents=True, exist_ok=True)
        return make(
            line, self.folder, recipe, checkpoint, text=args.text, device=args.device,
            python=self.pythons.get(line.tool), create_environment=args.create_environment, progress=self._show,
        )  # fmt: skip

    def _measure(self, checkpoint: Path, line: Line) -> dict[str, Any]:
        if self.yardstick is None:
            what = f"{self.folder.name}: reading held-out text"
            self.yardstick = Yardstick(
                self.folder, self.windows, self.args.device, lambda done, total: self._show(done, total, what)
            )
        what = f"{line.slug}: reading held-out text"
        quality, bits = self.yardstick.measure(checkpoint, lambda done, total: self._show(done, total, what))
        return {"bits": bits, **row(quality)}


def pythons(words: list[str]) -> dict[str, Path]:
    """Return the Python of each tool that ``TOOL=PATH`` words name.

    Raises:
        ParetoError: a word is not of that form, or its tool is unknown.

    """
    found = {}
    for word in words:
        tool, equals, path = word.partition("=")
        if not equals or tool not in BACKENDS:
            raise ParetoError(f"--backend-python {word}: expected TOOL=PATH, the tool one of {', '.join(BACKENDS)}")
        found[tool] = Path(path).expanduser()
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| recipe | tool | bits a weight | KL | top-1 | perplexity | seconds | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        cost = result["cost"]
        memory = cost["peak_device_memory"] or cost["peak_memory"]
        lines.append(
            f"| {result['settings']['recipe']['name']} | {result['settings']['tool']} | {result['bits']:.3f} | "
            f"{result['kl']['value']:.4f} | {result['top1_agreement']['value']:.3f} | "
            f"{result['perplexity']['value']:.2f} | {cost['seconds']:.0f} | {memory / 1e9:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the divergences as bars, one group a recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 0.3 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{r['settings']['recipe']['name']}  {r['settings']['tool']}" for r in results]
    values = [r["kl"]["value"] for r in results]
    axes.barh(range(len(results)), values, color=[COLOURS[r["settings"]["tool"]] for r in results])
    for place, value in enumerate(values):
        axes.annotate(f" {value:.4f}", (value, place), va="center", fontsize=8)
    axes.set_yticks(range(len(results)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("KL divergence to the original, nats a token (less is better)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Compare, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the original: embedded name, folder, or hub name")
    parser.add_argument("--lines", nargs="+", metavar="TOOL:RECIPE", default=list(LINES), help=f"({', '.join(LINES)})")
    parser.add_argument("--text", type=Path, help="calibration text, .txt or .jsonl (default: the model's samples)")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on, never the calibration text")
    parser.add_argument("--num-sequences", type=int, default=128, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens in each (default: %(default)s)")
    parser.add_argument("--num-windows", type=int, default=10, help="held-out windows (default: %(default)s)")
    parser.add_argument("--window-tokens", type=int, default=2048, help="tokens in each (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device of tools and measurement (default: %(default)s)")
    parser.add_argument(
        "--backend-python", nargs="+", default=[], metavar="TOOL=PATH", help="environments that have the tools"
    )
    parser.add_argument("--create-environment", action="store_true", help="install the tools that are missing")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("compare-checkpoints"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--again", action="store_true", help="repeat lines that have a result")
    args = parser.parse_args(argv)
    failed: list[str] = []
    try:
        lines = [Line.parse(text) for text in args.lines]
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, transient=True) as bar:
            comparison = Comparison(args, bar)
            for line in lines:
                try:
                    comparison.run(line)
                except ParetoError as error:
                    # A tool that is missing or fails keeps no other from being measured.
                    failed.append(f"{line.tool}:{line.recipe}: {error}")
        if results := comparison.results():
            write_text(args.out / "table.md", table(results))
            plot(results, args.out / "kl.png")
            print(table(results), end="")
    except ParetoError as error:
        failed.append(str(error))
    for reason in failed:
        print(f"compare_compressors: error: {reason}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
