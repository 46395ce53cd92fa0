"""Puts a study together from its raw records: the typed result, and the page."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.engine import plain_dtype
from bench.files import write_bytes, write_json, write_text
from bench.study import compare
from bench.study.folder import Folder
from bench.study.page import render
from bench.study.run import BEFORE, DONE, FAILED, Progress, State
from bench.study.samples import Measured, Result, measured
from bench.study.schema import PointResult, StepResult, Study
from bench.study.step import Step
from bench.study.steps import Graph
from bench.study.verdicts import compared, decided, improvements

STUDY, PAGE, PLAN = "study.json", "study.html", "plan.yaml"


def conclude(graph: Graph, folder: Folder, plan_file: Path, progress: Progress, place: Path | None = None) -> Path:
    """Write a study's result and page, as far as its steps are done; returns the page's path.

    Args:
        graph: the steps.
        folder: of their results.
        plan_file: the plan, which is kept beside the page.
        progress: how each step ended.
        place: where to write; None for the plan's own folder.

    """
    text = plan_file.read_bytes()
    place = place or folder.plan(graph.plan.study)
    result = finder(graph, folder, progress.states)
    study, found = judge(graph, result, folder, progress.states, hashlib.sha256(text).hexdigest())
    write_bytes(place / PLAN, text)
    write_json(place / STUDY, study.to_dict())
    write_text(place / PAGE, render(study, graph, found))
    return place / PAGE


def finder(graph: Graph, folder: Folder, states: Mapping[str, State]) -> Result:
    """Return what finds the results of the steps that are done."""

    def result(key: str) -> Path | None:
        return folder.result(key) if states[key].status in (DONE, BEFORE) else None

    return result


def judge(
    graph: Graph, result: Result, folder: Folder, states: Mapping[str, State], plan_sha256: str
) -> tuple[Study, list[Measured]]:
    """Return a study's result, and what it was made from.

    Args:
        graph: the steps.
        result: finds the results of those that are done.
        folder: of the steps.
        states: how each step ended.
        plan_sha256: of the plan's file.

    """
    plan = graph.plan
    found = measured(graph, result)
    outcomes = {key: folder.recorded(key) for key in graph.steps}
    started = [one.started_at for key, one in outcomes.items() if one is not None and result(key) is not None]
    study = Study(
        study=plan.study,
        title=plan.title or plan.study,
        created_at=max(started, default=""),
        plan_sha256=plan_sha256,
        seeds=[plan.seed + run for run in range(plan.runs)],
        context_tokens=plan.context_tokens,
        machines=_machines(found),
        points=[_point(one) for one in found],
        comparisons=compared(plan, found),
        improvements=improvements(plan, found),
        hypotheses=decided(plan, graph.points, found),
        steps=[_step(step, states[step.key]) for step in graph.steps.values()],
        notes=_notes(graph, found),
    )
    return study, found


def _point(one: Measured) -> PointResult:
    point = one.point
    return PointResult(
        name=point.name,
        model=point.model,
        weights=point.weights.name if point.weights else None,
        kv=plain_dtype(point.kv),
        hardware=one.hardware,
        is_baseline=point.is_baseline,
        settings=point.weights.all_settings if point.weights else {},
        runs={key: len(sample.runs) for key, sample in one.samples.items()},
        figures={key: compare.value(sample) for key, sample in one.samples.items()},
    )


def _step(step: Step, state: State) -> StepResult:
    # How often it was started again, and whether it was this command that did it, is no part of the result.
    status = {BEFORE: DONE}.get(state.status, state.status)
    return StepResult(
        step.key, step.kind, step.name, status, state.reason, state.seconds if status in (DONE, FAILED) else 0.0
    )


def _machines(found: list[Measured]) -> dict[str, list[dict[str, Any]]]:
    made: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        known = made.setdefault(one.hardware, [])
        known += [machine for machine in one.machines if machine not in known]
    return made


def _notes(graph: Graph, found: list[Measured]) -> list[str]:
    notes = list(dict.fromkeys(note for one in found for note in one.notes))
    if graph.plan.runs < compare.RUNS_NEEDED and any(point.seeded for point in graph.points):
        notes.append(
            f"runs: {graph.plan.runs}; with fewer than {compare.RUNS_NEEDED} nothing tells how much of a compressed "
            "point's figures is its seed's, so that no verdict on one is given"
        )
    commits = {str(machine.get("commit")) for one in found for machine in one.machines if machine.get("commit")}
    if len(commits) > 1:
        notes.append(f"results are of {len(commits)} commits of this project: {', '.join(sorted(commits))}")
    return notes
