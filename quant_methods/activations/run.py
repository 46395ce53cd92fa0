"""Measures a model's activations before and after a recipe's preparing steps, and writes table, data and plot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kv_cache.atomic import write_bytes
from quant_methods.activations.input_statistics import Criteria, InputStatistics, document, markdown, measure
from quant_methods.activations.plot import plot
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import Source, full_disk_explained, write_json
from quant_methods.compress import prepare
from quant_methods.recipe import Recipe

NAME = "activation_statistics"


def statistics(
    model: str | os.PathLike[str],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    sequences: int,
    criteria: Criteria | None = None,
    text: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[list[InputStatistics], list[InputStatistics] | None]:
    """Measure activations and write ``activation_statistics.json``, ``.md`` and ``.png``.

    Args:
        model: an embedded model's name, a directory, or a hub name.
        recipe: whose preparing steps (rotate, smoothquant, awq) the second measurement carries out.
        out: directory of the results.
        sequences: calibration sequences.
        criteria: what counts as an outlier.
        text: calibration text (.txt or .jsonl); None lets the model write its own.
        device: torch device.
        overwrite: write into a directory that is not empty.
        progress: called with (blocks done, blocks in all, what happens now).

    Returns:
        The statistics before, and after; None for the latter if the recipe prepares nothing.

    Raises:
        ParetoError: bad input.

    """
    out, criteria = Path(out), criteria or Criteria()
    model_dir, decoder, plan = prepare(model, recipe, out, device=device, overwrite=overwrite, inside=True)
    tokens = load_sequences(
        model_dir,
        None if text is None else Path(text),
        sequences,
        recipe.calibration.length,
        recipe.calibration.seed,
        device=device,
        progress=lambda done, steps: progress(done, steps, "sampling text"),
    )
    plain = Decoder(model_dir, Source(model_dir), device)
    before = measure(plain, tokens, None, criteria, lambda done, total: progress(done, total, "before"))
    after = None
    if plan.transforms or decoder.source.changed():
        after = measure(decoder, tokens, plan, criteria, lambda done, total: progress(done, total, "after"))
    with full_disk_explained(out):
        out.mkdir(parents=True, exist_ok=True)
        data = document(model_dir.name, recipe.name if after else None, criteria, before=before, after=after)
        write_json(out / f"{NAME}.json", data)
        write_bytes(out / f"{NAME}.md", (markdown(before, after, criteria) + "\n").encode())
        title = f"inputs of the linear layers of {model_dir.name}"
        title += f", before and after the preparing steps of {recipe.name}" if after else ""
        write_bytes(out / f"{NAME}.png", plot(before, after, criteria, title))
    return before, after
