"""Draws what every unit of layers loses at each width, and which width it got."""

from __future__ import annotations

from quant_methods.mixed_precision.budget import Assignment
from quant_methods.mixed_precision.units import Unit, Width
from quant_methods.plots import COLOURS, MARKERS, label_places, png, short_name


def plot(assignment: Assignment, title: str) -> bytes:
    """Return a PNG: above, each unit's loss at every width, the chosen one filled; below, the bits that it got."""
    # The object-oriented interface needs no display and no global state.
    from matplotlib.figure import Figure

    units = assignment.units
    places = range(len(units))
    figure = Figure(figsize=(min(5 + 0.22 * len(units), 16), 6.4), layout="constrained", dpi=130)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    chosen = [choice.width for choice in assignment.chosen]
    widths = [choice.width for choice in units[0].choices if not Width.parse(choice.width).whole]
    colours = {width: COLOURS[i % len(COLOURS)] for i, width in enumerate(widths)}
    for i, width in enumerate(widths):
        losses = [_loss(unit, width, assignment.loss) for unit in units]
        above.plot(places, losses, color=colours[width], linewidth=0.6, alpha=0.5, zorder=1)
        for taken in (False, True):
            picked = [x for x in places if (chosen[x] == width) is taken]
            above.plot(
                picked, [losses[x] for x in picked], MARKERS[i % len(MARKERS)], color=colours[width], zorder=2 + taken,
                markersize=7 if taken else 4.5, markerfacecolor=colours[width] if taken else "white",
                label=f"{width} bits" if taken else None,
            )  # fmt: skip
    above.set_yscale("log")
    above.set_ylabel("KL divergence, nats a token" if assignment.loss == "kl" else "relative output error, squared")
    above.set_title(f"{title}\nwhat quantizing each layer alone costs (filled: chosen)", fontsize=10)
    bits = [Width.parse(width).bits for width in chosen]
    below.bar(places, bits, color=[colours.get(width, "#888888") for width in chosen], width=0.8)
    below.axhline(assignment.bits_per_weight, color="black", linewidth=0.9, linestyle="--")
    below.set_title(f"mean {assignment.bits_per_weight:.3f} bits a weight, scales included (dashed)", fontsize=9)
    below.set_ylabel("chosen bits")
    below.set_ylim(0, max(bits) + 1.5)
    below.set_yticks(sorted(set(bits)))
    ticks, names = label_places([short_name(unit.name) for unit in units])
    below.set_xticks(ticks, names, rotation=90 if len(ticks) == len(units) else 0, fontsize=8)
    below.set_xlabel("layers, by block")
    for axes in (above, below):
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlim(-0.8, len(units) - 0.2)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)


def _loss(unit: Unit, width: str, loss: str) -> float:
    choice = next(choice for choice in unit.choices if choice.width == width)
    value = choice.error if loss == "hessian" else choice.kl
    return max(value or 0.0, 1e-9)
