"""Draws the board without Grafana, from the same queries: ``python -m loadtest.deploy.preview --out board.png``."""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.deploy.panels import ROWS, Kind, Panel, filled
from loadtest.deploy.prometheus_api import Line, Prometheus
from loadtest.errors import LoadTestError

_COLUMNS, _POINTS, _COLOURS = 4, 240, 28
_LEGEND_LINES = 8
_STYLES = ("-", ":", "--", "-.")
_UNITS = {"s": " (s)", "reqps": " (1/s)", "percentunit": " (part)"}


@dataclass(frozen=True)
class Drawn:
    """A line of a panel: its legend, the number of its query, and what Prometheus said."""

    name: str
    query: int
    line: Line


Found = dict[Panel, list[Drawn]]


def main(argv: list[str] | None = None) -> int:
    """Draw the board; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.deploy.preview",
        description="Draw the board of docs/watching.md as a picture, from its queries to a Prometheus server.",
    )
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write, such as board.png")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="last minutes shown (default: 30)")
    parser.add_argument("--end", type=float, metavar="UNIX_S", help="end of these, seconds since 1970 (default: now)")
    parser.add_argument("--window", default="20s", help="of rates: 4 scrapes or more (default: %(default)s)")
    parser.add_argument("--instance", default=".*", metavar="REGEX", help="servers, as host:port (default: all)")
    parser.add_argument("--run", default=".*", metavar="REGEX", help="load tests, by name of the run (default: all)")
    args = parser.parse_args(argv)
    try:
        empty = draw(args)
    except LoadTestError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    if empty:
        print(f"nothing to show in {len(empty)} panels: {', '.join(empty)}", file=sys.stderr)
    return 0


def draw(args: argparse.Namespace) -> list[str]:
    """Write the picture; returns the titles of panels without a line.

    Raises:
        LoadTestError: a flag is no good, Prometheus does not answer or has nothing, or the picture cannot be written.

    """
    if not 0 < args.minutes < math.inf:
        raise LoadTestError(f"--minutes {args.minutes:g}: must be above 0")
    if not re.fullmatch(r"[1-9]\d*(ms|s|m|h|d)", args.window):
        raise LoadTestError(f"--window {args.window}: expected a time such as 20s or 5m")
    if not args.out.parent.is_dir():
        raise LoadTestError(f"--out {args.out}: there is no folder {args.out.parent}")
    end = time.time() if args.end is None else args.end
    start = end - 60 * args.minutes
    step = max(1.0, (end - start) / _POINTS)
    server = Prometheus(args.prometheus)
    found = {
        panel: [
            Drawn(query.legend, number, line)
            for number, query in enumerate(panel.queries)
            for line in server.range(filled(query.expr, args.window, args.instance, args.run), start, end, step)
            if np.isfinite(line.values).any()
        ]
        for panels in ROWS.values()
        for panel in panels
    }
    if not any(found.values()):
        raise LoadTestError(f"{args.prometheus} has nothing to show of the last {args.minutes:g} minutes")
    try:
        args.out.write_bytes(_picture(*_named(found), start, end))
    except OSError as error:
        raise LoadTestError(f"--out {args.out}: {error.strerror}") from error
    return [panel.title for panel, lines in found.items() if not lines]


def _named(found: Found) -> tuple[Found, list[str]]:
    """Return the lines with their legends filled in, and the servers and load tests if there are several of either.

    The one server, or the one load test, needs no name in each legend.
    """
    everything = [each.line.labels for lines in found.values() for each in lines]
    several = []
    for name in ("instance", "label"):
        values = {labels[name] for labels in everything if name in labels}
        several += [value for value in sorted(values) if len(values) > 1 and value not in several]
        if len(values) == 1:
            found = {
                panel: [replace(each, name=each.name.replace(f"{{{{{name}}}}}", "")) for each in lines]
                for panel, lines in found.items()
            }
    return {
        panel: [replace(each, name=legend(each.name, each.line)) for each in lines] for panel, lines in found.items()
    }, several


def legend(text: str, line: Line) -> str:
    """Return a legend in Grafana's form with the labels of a line in it."""
    filled_in = re.sub(r"{{(\w+)}}", lambda match: line.labels.get(match[1], ""), text)
    return " ".join(filled_in.split())


def _picture(found: Found, several: list[str], start: float, end: float) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image

    figure = Figure(figsize=(_COLUMNS * 4, len(found) / _COLUMNS * 2.6), dpi=66)
    rows: list[list[Panel]] = []
    for panels in ROWS.values():
        rows += [list(panels[at : at + _COLUMNS]) for at in range(0, len(panels), _COLUMNS)]
    # Numbers need less room than lines.
    heights = [1.0 if any(panel.kind is Kind.LINES for panel in row) else 0.45 for row in rows]
    grid = figure.subplots(len(rows), _COLUMNS, squeeze=False, height_ratios=heights)
    figure.subplots_adjust(left=0.03, right=0.99, bottom=0.02, top=0.97, wspace=0.16, hspace=0.3)
    # Long times in minutes.
    scale, unit = (60.0, "min") if end - start > 300 else (1.0, "s")
    ticks = [at for at in MaxNLocator(5).tick_values(0, (end - start) / scale) if start + scale * at <= end]
    for axes, row in zip(grid, rows, strict=True):
        for axis in axes[len(row) :]:
            axis.axis("off")
        for axis, panel in zip(axes, row, strict=False):
            if panel.kind is Kind.LINES:
                _draw_lines(axis, panel, found[panel], several)
                names = [f"{at:g}" if at < ticks[-1] else f"{at:g} {unit}" for at in ticks]
                axis.set_xticks([start + scale * at for at in ticks], names)
                axis.set_xlim(start, end)
            else:
                _draw_numbers(axis, panel, found[panel])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    # Few colours make a picture of lines and letters a third of its size.
    small = Image.open(buffer).convert("RGB").quantize(_COLOURS)
    out = io.BytesIO()
    small.save(out, format="png", optimize=True)
    return out.getvalue()


def _draw_lines(axis: Any, panel: Panel, lines: list[Drawn], several: list[str]) -> None:
    axis.set_title(panel.title + _UNITS.get(panel.unit, ""), fontsize=9, loc="left")
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    # What never leaves 0, such as errors that did not happen, is counted and not named.
    moving = [each for each in lines if np.nanmax(np.abs(each.line.values)) > 0]
    for number, each in enumerate(moving):
        # All that is of one server or load test has one colour; where there is one only, each line has its own.
        owner = each.line.labels.get("label") or each.line.labels.get("instance")
        color = f"C{several.index(owner)}" if owner in several else f"C{number}"
        style = _STYLES[each.query % len(_STYLES)] if several else "--" if each.name.startswith("server ") else "-"
        label = (each.name or "all") if number < _LEGEND_LINES else None
        axis.plot(each.line.times, each.line.values, style, color=color, linewidth=1.2, label=label)
    more = len(moving) - _LEGEND_LINES
    if more > 0:
        axis.plot([], [], alpha=0, label=f"and {more} more")
    if len(moving) < len(lines):
        axis.plot([], [], alpha=0, label=f"{'and ' if moving else ''}{len(lines) - len(moving)} at 0")
    if lines:
        # Room above the lines for the legend.
        axis.set_ylim(0, max((1.5 * np.nanmax(each.line.values) for each in moving), default=1))
        axis.legend(fontsize=6.5, loc="upper left", ncols=2, framealpha=0.6, handlelength=1.8, columnspacing=1)
    else:
        axis.text(0.5, 0.5, "nothing", ha="center", transform=axis.transAxes, fontsize=9)


def _draw_numbers(axis: Any, panel: Panel, lines: list[Drawn]) -> None:
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.set_xticks([])
    axis.set_yticks([])
    texts = []
    for each in lines:
        last = each.line.values[np.isfinite(each.line.values)][-1]
        texts.append(each.name if panel.kind is Kind.NAMES else f"{last:.4g}   {each.name}")
    axis.text(0.03, 0.9, "\n".join(texts) or "nothing", va="top", transform=axis.transAxes, fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
