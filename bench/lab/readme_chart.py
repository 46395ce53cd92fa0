"""Draws the chart of the README: what KV-cache dtypes lose against their bits, and how long a decode step takes.

python -m bench.lab.readme_chart results/kv-study/smollm2/kv-study.json results/gpu-kv-bench-few-bits/kv-bench.json \\
    results/gpu-kv-bench-few-bits/beside-int4-per-token-head.json results/gpu-kv-bench/kv-bench.json
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.figure
from PIL import Image

from bench.engine import plain_dtype
from bench.files import write_bytes
from bench.kv_study.plot import STYLES, measured
from bench.kv_study.run import read_report
from bench.kv_study.schema import KVStudyReport
from bench.report.documents import collect
from bench.speed.schema import KVBenchReport
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS

FAMILIES = ("ours", "vLLM's")
VARIED = ("_all", "_4over6")
"""How the study's names of vLLM's dtypes end where it changed them; those are served by nobody."""


def steps(reports: Sequence[KVBenchReport], shape: tuple[int, int]) -> dict[str, float]:
    """Return the time of a decode step at a shape, bf16 = 1, by dtype.

    Args:
        reports: each dtype is taken from the first one that measured it, beside the bf16 of its own run.
        shape: sequences, tokens of context.

    Raises:
        ParetoError: none measured the shape.

    """
    found: dict[str, float] = {}
    for report in reports:
        for row in report.dtypes:
            for point in row.points if not row.error else ():
                if (point.batch, point.context) == shape and point.step_ratio:
                    found.setdefault(plain_dtype(row.kv_cache_dtype), 1 / point.step_ratio)
    if not found:
        raise ParetoError(f"no file measured the shape {shape[0]}x{shape[1]}")
    return found


def read(study: Path, speed: Sequence[Path]) -> tuple[KVStudyReport, list[KVBenchReport]]:
    """Return both kinds of documents.

    Raises:
        ParetoError: a file is none of its kind.

    """
    inputs = collect(speed)
    reports = [report for _, report in inputs.of(KVBenchReport)]
    if inputs.skipped or len(reports) < len(speed):
        raise ParetoError("; ".join(inputs.skipped) or "speed is read from results of pareto kv-bench only")
    return read_report(study), reports


def draw(study: KVStudyReport, speed: Sequence[KVBenchReport], shape: tuple[int, int], path: Path) -> None:
    """Draw both panels.

    Args:
        study: of one model.
        speed: see :func:`steps`.
        shape: likewise.
        path: of the PNG.

    """
    figure = mpl.figure.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = [(coder, bits, kl) for coder, bits, kl in measured(study) if bits < 10]
    for family in FAMILIES:
        colour, mark = STYLES[family]
        # Of ours what can be asked for by name; the study has every pair of bits.
        mine = [p for p in points if p[0].family == family and not p[0].name.endswith(VARIED)]
        mine = [p for p in mine if family != "ours" or p[0].name in FORMATS]
        left.scatter([p[1] for p in mine], [p[2] for p in mine], s=22, color=colour, marker=mark, label=family)
        for index, (coder, bits, kl) in enumerate(sorted(mine, key=lambda p: p[1:])):
            name = coder.name.removesuffix("_per_head")
            # By turns below and above, and to the left of the rightmost, for neighbours have long names.
            far = bits > 7
            place = (-4 if far else 4, 3 if family == "ours" or index % 2 else -8)
            side = "right" if far else "left"
            left.annotate(name, (bits, kl), xytext=place, textcoords="offset points", fontsize=6, ha=side)
    left.set_yscale("log")
    left.margins(x=0.2)
    left.set_xlabel("bits of an element of keys and values", fontsize=8)
    left.set_ylabel("KL divergence from full precision, nats", fontsize=8)
    left.set_title(f"quality, {Path(study.settings['model']).name}: lower and further left is better", fontsize=8)
    left.legend(fontsize=7, loc="lower left")
    left.grid(alpha=0.3)
    rows = sorted(steps(speed, shape).items(), key=lambda row: -row[1])
    colours = [STYLES["uncompressed" if n == "bf16" else FAMILIES[n not in FORMATS]][0] for n, _ in rows]
    bars = right.barh([n for n, _ in rows], [t for _, t in rows], color=colours, height=0.7)
    right.bar_label(bars, [f"{t:.2f}" for _, t in rows], padding=2, fontsize=7)
    right.margins(x=0.1)
    right.set_title(f"time of a decode step, {shape[0]} x {shape[1]:,} tokens, bf16 = 1", fontsize=8)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=110)
    # A palette of few colours: a third of the bytes, which stay in the repository for ever.
    Image.open(drawn).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    write_bytes(path, small.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="kv-study.json")
    parser.add_argument(
        "speed", type=Path, nargs="+", help="kv-bench.json; a dtype is taken from the first that has it"
    )
    parser.add_argument("--shape", default="32x8192", help="sequences x tokens of context (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/kv-cache.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        batch, context = (int(number) for number in args.shape.split("x"))
    except ValueError:
        parser.exit(2, f"readme_chart: error: --shape {args.shape}: write sequences x tokens, such as 32x8192\n")
    try:
        draw(*read(args.study, args.speed), (batch, context), args.out)
    except ParetoError as error:
        parser.exit(2, f"readme_chart: error: {error}\n")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
