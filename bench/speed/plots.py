"""Draws what kv-bench and eval measured of KV-cache dtypes: decode time against bf16, and quality against it.

python -m bench.speed.plots results/gpu-kv-bench/kv-bench.json results/quality-gpu-decode/eval.json --out docs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.figure

from bench.engine import plain_dtype
from bench.files import read_json
from kv_cache.errors import ParetoError
from kv_cache.formats import DTYPES

OURS, VLLMS, PLAIN = "#1f6feb", "#8b949e", "#24292f"


def _colour(dtype: str) -> str:
    return OURS if dtype in DTYPES else PLAIN if dtype == plain_dtype("auto") else VLLMS


def decode_plot(document: dict[str, Any], path: Path) -> None:
    """Draw the decode step of each dtype relative to bf16, one panel for each shape.

    Args:
        document: of ``kv-bench.json``.
        path: of the PNG.

    """
    points: dict[tuple[int, int], list[tuple[str, float]]] = {}
    for row in document["dtypes"]:
        if row["error"] or row.get("model"):
            continue
        for point in row["points"]:
            if point["step_ratio"]:
                key = (point["batch"], point["context"])
                points.setdefault(key, []).append((plain_dtype(row["kv_cache_dtype"]), 1 / point["step_ratio"]))
    figure = mpl.figure.Figure(figsize=(10, 1.2 + 0.28 * max(map(len, points.values()))), layout="constrained")
    for axes, (shape, rows) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        names = [name for name, _ in rows][::-1]
        values = [value for _, value in rows][::-1]
        bars = axes.barh(names, values, color=[_colour(name) for name in names], height=0.7)
        axes.bar_label(
            bars,
            [f"{value:.2f}" for value in values],
            padding=2,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
        axes.axvline(1, color=PLAIN, linewidth=0.8, linestyle=":")
        axes.set_xlim(0, max(values) * 1.25)
        axes.set_title(f"{shape[0]} x {shape[1]:,} tokens", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of a decode step, bf16 = 1 (less is better)", fontsize=9)
    figure.savefig(path, dpi=150)


def trade_off_plot(speed: dict[str, Any], quality: dict[str, Any], path: Path) -> None:
    """Draw KL divergence against decode time, a marker's area the bytes of a token.

    Args:
        speed: of ``kv-bench.json``; the shape with the most context counts.
        quality: of ``eval.json``.
        path: of the PNG.

    """
    losses = {
        plain_dtype(entry["kv_cache"]["dtype"]): (
            entry["overall"]["kl"]["value"],
            entry["kv_cache"]["bits_per_element"],
        )
        for entry in quality["configurations"]
        if not entry["is_baseline"] and entry["overall"]
    }
    shape, marks = (0, 0), []
    for row in speed["dtypes"]:
        name = plain_dtype(row["kv_cache_dtype"])
        if row["error"] or row.get("model") or name not in losses:
            continue
        point = max(row["points"], key=lambda p: p["batch"] * p["context"])
        shape = point["batch"], point["context"]
        marks.append((name, 1 / point["step_ratio"], *losses[name]))
    if not marks:
        raise ParetoError("the two results have no KV-cache dtype in common")
    figure = mpl.figure.Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    middle = (min(mark[1] for mark in marks) + max(mark[1] for mark in marks)) / 2
    for name, step, loss, bits in marks:
        axes.scatter(step, loss, s=30 * bits, color=_colour(name), alpha=0.85)
        right = step > middle
        axes.annotate(
            f"{name}, {bits:.1f} bits",
            (step, loss),
            xytext=(-9 if right else 9, 6),
            textcoords="offset points",
            horizontalalignment="right" if right else "left",
            fontsize=8,
        )
    axes.set_yscale("log")
    axes.margins(0.22, 0.15)
    axes.set_xlabel(f"time of a decode step at {shape[0]} x {shape[1]:,} tokens, bf16 = 1 (less is better)", fontsize=9)
    axes.set_ylabel("KL divergence from bf16, nats per token (less is better)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _read(path: Path) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise ParetoError(f"{path} is missing or not a result")
    return document


def main(argv: list[str] | None = None) -> int:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speed", type=Path, help="kv-bench.json")
    parser.add_argument("quality", type=Path, help="eval.json")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        speed, quality = _read(args.speed), _read(args.quality)
        decode_plot(speed, args.out / "kv-decode.png")
        trade_off_plot(speed, quality, args.out / "kv-trade-off.png")
    except ParetoError as error:
        parser.exit(2, f"kv_plots: error: {error}\n")
    print(f"wrote {args.out / 'kv-decode.png'} and {args.out / 'kv-trade-off.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
