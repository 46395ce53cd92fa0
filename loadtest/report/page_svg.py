"""Inline SVG plots that follow the page's light or dark colours.

matplotlib writes fixed colours; each is a marker that is replaced by a CSS variable afterwards, so one plot serves both
colour schemes. Text stays text: it scales, can be searched and is read aloud.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl

FOREGROUND, MUTED, GRID, BACKGROUND = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0500{i:02x}" for i in range(8))
_VARIABLES = {FOREGROUND: "var(--fg)", MUTED: "var(--muted)", GRID: "var(--grid)", BACKGROUND: "var(--bg)"} | {
    colour: f"var(--s{i})" for i, colour in enumerate(SERIES)
}


def style(axes: Any) -> None:
    """Give axes of matplotlib the page's looks."""
    axes.figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(which="both", color=MUTED, labelcolor=FOREGROUND, labelsize=8)
    axes.xaxis.label.set(color=FOREGROUND, size=9)
    axes.yaxis.label.set(color=FOREGROUND, size=9)


def svg(figure: Any, name: str) -> str:
    """Return a figure as an ``<svg>`` element with CSS variables for its colours and the page's font.

    Args:
        figure: of matplotlib.
        name: unique on the page.

    """
    buffer = io.StringIO()
    # Element ids are hashes of this salt: plots of one page must not share them.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Group ids such as "axes_1" repeat in every plot and nothing refers to them.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # The page's own font, and a size that follows the page's width.
    text = re.sub(r"font(-family)?: ([\d.]+px)? ?[^;\"]*sans-serif[^;\"]*", _font, text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" width="[\d.]+pt"', 'role="img"', text, count=1)


def _font(match: re.Match[str]) -> str:
    size = match.group(2)
    return f"font: {size} var(--font)" if size else "font-family: var(--font)"
