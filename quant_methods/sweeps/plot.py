"""Draws a sweep: KL divergence against bits a weight, one mark a point, numbered as in the table."""

from __future__ import annotations

from typing import Any

from quant_methods.mixed_precision.sensitivity_plot import COLOURS, MARKERS, png


def frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that no other has at most the bits and less KL of, by rising bits."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["bits_per_weight"], row["kl"])):
        if not best or row["kl"] < best[-1]["kl"]:
            best.append(row)
    return best


def plot(rows: list[dict[str, Any]], title: str) -> bytes:
    """Return a PNG."""
    # The object-oriented interface needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    families = list(dict.fromkeys(row["name"].split()[0] for row in rows))
    edge = frontier(rows)
    axes.plot(
        [row["bits_per_weight"] for row in edge], [_shown(row) for row in edge], color="#888888", linewidth=1,
        linestyle="--", zorder=1, label="best for its bits",
    )  # fmt: skip
    for place, family in enumerate(families):
        own = [row for row in rows if row["name"].split()[0] == family]
        axes.plot(
            [row["bits_per_weight"] for row in own], [_shown(row) for row in own], MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)], markersize=7, label=family, zorder=2,
        )  # fmt: skip
    for number, row in enumerate(rows, 1):
        axes.annotate(
            str(number), (row["bits_per_weight"], _shown(row)), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, everything included")
    axes.set_ylabel("KL divergence to the original, nats a token")
    axes.set_title(f"{title} (numbers: rows of the table)", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.7, which="both")
    axes.set_axisbelow(True)
    axes.margins(0.08)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)


def _shown(row: dict[str, Any]) -> float:
    return max(row["kl"], 1e-7)  # A logarithmic axis has no zero.
