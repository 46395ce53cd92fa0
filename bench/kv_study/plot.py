"""Draws KL divergence against bits of an element, one mark for each coder of a study."""

from __future__ import annotations

from pathlib import Path

from bench.frontier import non_dominated
from bench.kv_study.schema import CoderResult, KVStudyReport
from kv_cache.errors import ParetoError

STYLES = {
    "ours": ("#1f6feb", "o"),
    "ours, varied": ("#79b8ff", "."),
    "vLLM's": ("#8b949e", "s"),
    "papers": ("#d29922", "^"),
    "uncompressed": ("#24292f", "D"),
}
"""Colour and mark of each family; those of ours, vLLM's and bf16 are as in the project's other pictures."""
WIDEST = 10.0
"""Bits up to which the picture reaches."""


def measured(report: KVStudyReport) -> list[tuple[CoderResult, float, float]]:
    """Return the coders that have figures, each with its bits and its KL divergence."""
    return [(coder, coder.bits, coder.kl.value) for coder in report.coders if coder.bits is not None and coder.kl]


def frontier(report: KVStudyReport) -> set[str]:
    """Return the names of the coders that no other one beats in bits and KL divergence."""
    points = measured(report)
    best = non_dominated([(bits, kl) for _, bits, kl in points])
    return {coder.name for (coder, _, _), on in zip(points, best, strict=True) if on}


def plot(report: KVStudyReport, path: Path) -> None:
    """Draw a study.

    Args:
        report: with at least one measured coder.
        path: of the PNG.

    Raises:
        ParetoError: matplotlib is not installed, or nothing was measured.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ParetoError("drawing needs matplotlib: pip install matplotlib, then pareto kv-study --plot") from error
    points = [(coder, bits, kl) for coder, bits, kl in measured(report) if bits <= WIDEST and kl > 0]
    if not points:
        raise ParetoError(f"no coder of at most {WIDEST:g} bits was measured: nothing to draw")
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots()
    best = frontier(report)
    line = sorted((bits, kl) for coder, bits, kl in points if coder.name in best)
    axes.plot(*zip(*line, strict=True), color="#24292f", linewidth=0.8, linestyle="--", zorder=1)
    for family, (colour, mark) in STYLES.items():
        mine = [(coder, bits, kl) for coder, bits, kl in points if coder.family == family]
        if not mine:
            continue
        _, x, y = zip(*mine, strict=True)
        errors = [coder.kl.standard_error or 0.0 for coder, _, _ in mine if coder.kl]
        axes.errorbar(x, y, errors, fmt=mark, color=colour, markersize=5, elinewidth=0.7, label=family, zorder=3)
        for coder, bits, kl in mine:
            # Variations lie close together: only those that beat everything get their names.
            if family != "ours, varied" or coder.name in best:
                name = coder.name.removesuffix("_per_head")
                axes.annotate(name, (bits, kl), xytext=(4, 3), textcoords="offset points", fontsize=6)
    axes.set_yscale("log")
    axes.set_xlabel("bits of an element of keys and values, scales and other metadata included", fontsize=9)
    axes.set_ylabel("KL divergence from full precision, nats per token (less is better)", fontsize=9)
    settings = report.settings
    axes.set_title(
        f"{Path(settings['model']).name}: {len(report.reference_nll)} windows of {settings['window_tokens']:,} tokens, "
        "every token read from codes; dashed: what no other coder beats",
        fontsize=9,
    )
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
