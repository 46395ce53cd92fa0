"""Draws what every layer's keys and values lose at each width, and which width they got."""

from __future__ import annotations

from quant_methods.calibration.kv_codes import KINDS
from quant_methods.mixed_precision.kv_budget import KVAssignment
from quant_methods.plots import COLOURS, MARKERS, png


def plot(assignment: KVAssignment, title: str) -> bytes:
    """Return a PNG: losses of keys, of values (the chosen width filled), and the chosen bits, over the layers."""
    # The object-oriented interface needs no display and no global state.
    from matplotlib.figure import Figure

    places = range(len(assignment.bits))
    figure = Figure(figsize=(min(5 + 0.16 * len(places), 16), 8), layout="constrained", dpi=130)
    *above, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.3))
    above[1].sharey(above[0])
    for side, (kind, axes) in enumerate(zip(KINDS, above, strict=True)):
        chosen = [pair[side] for pair in assignment.bits]
        for number, width in enumerate(assignment.losses[0][kind]):
            losses = [max(found[kind][width], 1e-9) for found in assignment.losses]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.plot(places, losses, color=colour, linewidth=0.6, alpha=0.5, zorder=1)
            for taken in (False, True):
                picked = [x for x in places if (chosen[x] == width) is taken]
                axes.plot(
                    picked, [losses[x] for x in picked], marker, color=colour, zorder=2 + taken,
                    markersize=6 if taken else 4, markerfacecolor=colour if taken else "white",
                    label=f"{width} bits" if taken and not side else None,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylabel("KL divergence, nats a token")
        axes.set_title(f"what coding a layer's {kind}s costs (filled: chosen)", fontsize=9)
        below.step(places, chosen, where="mid", color=COLOURS[3 * side], label=f"{kind}s")
    below.set_ylabel("chosen bits")
    below.set_yticks(sorted({bits for pair in assignment.bits for bits in pair}))
    below.legend(frameon=False, fontsize=8)
    below.set_title(f"mean {assignment.bits_per_element:.3f} bits an element, scales and zeros included", fontsize=9)
    below.set_xlabel("layer")
    for axes in (*above, below):
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlim(-0.8, len(places) - 0.2)
        for side_name in ("top", "right"):
            axes.spines[side_name].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.legend(*above[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)
