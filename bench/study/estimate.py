"""What a study will cost: each step's time and disk, from earlier steps of its kind or from rough figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from bench.study.folder import Folder
from bench.study.step import ORDER, Kind, Step
from bench.study.steps import Graph
from kv_cache.sizes import readable
from kv_cache.terminal import console

ROUGH: dict[Kind, tuple[float, float, float]] = {
    "distill": (30, 0, 0), "compress": (20, 6000, 60), "quality": (60, 5000, 30), "tasks": (120, 40000, 120),
    "load": (60, 4000, 20), "served": (200, 8000, 60), "speed": (120, 8000, 60),
}  # fmt: skip
"""Rough seconds: of a start, and of each billion parameters on a CPU and on a GPU. Orders of magnitude, no more."""
TRAINED: tuple[float, float] = (0.1, 5e-5)
"""The same of each token that a student of half its teacher's size learns, on a CPU and on a GPU."""


def rough_seconds(step: Step) -> float:
    """Return the rough time of a step whose like was never done here."""
    start, on_cpu, on_gpu = ROUGH[step.kind]
    each = (on_gpu if step.gpus else on_cpu) + TRAINED[bool(step.gpus)] * step.tokens
    return start + each * step.parameters / 1e9


def similar_seconds(step: Step, known: Sequence[tuple[Step, float]]) -> float | None:
    """Return the median time of done steps of a kind, hardware, model size and length of training; None without any."""
    like = [
        seconds
        for other, seconds in known
        if other.kind == step.kind and other.hardware == step.hardware and other.gpus == step.gpus
        and abs(other.parameters - step.parameters) <= 0.1 * step.parameters
        and abs(other.tokens - step.tokens) <= 0.1 * step.tokens
    ]  # fmt: skip
    return statistics.median(like) if like else None


def done_steps(folder: Folder) -> list[tuple[Step, float]]:
    """Return all steps that were ever done in a folder, with their seconds."""
    return [(step, outcome.seconds) for step, outcome in folder.done()]


def duration(seconds: float) -> str:
    """Return a time in words, as exact as an estimate is."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show(
    graph: Graph, folder: Folder, missing: Sequence[str], hardware: Sequence[str], kinds: Sequence[str] = ORDER
) -> None:
    """Print the steps of a study with what is done and what the rest may take.

    Args:
        graph: the steps.
        folder: where results lie.
        missing: what the plan needs and is not here, a line each.
        hardware: labels whose steps would be done.
        kinds: of steps that would be done.

    """
    known = done_steps(folder)
    table = Table(title=f"{graph.plan.study}: steps", title_justify="left")
    for heading in ("step", "state", "time", "disk", "key"):
        table.add_column(heading, justify="right" if heading in ("time", "disk") else "left", overflow="fold")
    total, disk, open_steps, guessed = 0.0, 0.0, 0, 0
    for step in graph.steps.values():
        outcome = folder.outcome(step)
        if outcome is not None and outcome.status == "done":
            table.add_row(step.name, "done", duration(outcome.seconds), "", step.key)
            continue
        if step.hardware and step.hardware not in hardware:
            table.add_row(step.name, f"for {step.hardware}", "", "", step.key)
            continue
        if step.kind not in kinds:
            table.add_row(step.name, "left out", "", "", step.key)
            continue
        like = similar_seconds(step, known)
        seconds = rough_seconds(step) if like is None else like
        total, disk, open_steps = total + seconds, disk + step.disk_bytes, open_steps + 1
        guessed += like is None
        state = "to do" if outcome is None else "failed before"
        about = f"{'~' if like is None else ''}{duration(seconds)}"
        table.add_row(step.name, state, about, readable(step.disk_bytes), step.key)
    console(piped_width=150).print(table)
    for line in missing:
        print(f"not here: {line}")
    print(
        f"{len(graph.steps)} steps, {open_steps} to do: about {duration(total)} one after the other, {readable(disk)}"
    )
    if guessed:
        print(
            f"{guessed} of these times (~) are rough figures by the model's size, for want of an earlier step of the "
            "kind; they can be wrong several times over"
        )
