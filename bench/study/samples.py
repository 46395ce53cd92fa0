"""What a study measured of each point: every metric's values by unit and run, from the steps' raw records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bench.engine import plain_dtype
from bench.files import read_json
from bench.quality.schema import ConfigurationResult, EvalReport
from bench.quality.units import RESULT as UNITS
from bench.report.documents import collect
from bench.report.figures import Figure
from bench.report.metrics import BY_KEY, METRICS, MORE
from bench.report.rows import Row, stage_label, users
from bench.schema import KVCache
from bench.speed.schema import KVBenchReport
from bench.speed.served_schema import ServeBenchReport
from bench.study.plan import Plan
from bench.study.points import Point
from bench.study.steps import Graph
from kv_cache.errors import ParetoError
from loadtest.results.schema import Summary

ACCURACY = "accuracy"
BY_UNIT = {"kl": "kl", "top1": "top1", "needle": "needle", "perplexity": "nll"}
"""Metrics of the report whose values by unit are kept, and what they are kept as."""
ACCURACIES = ("acc_norm", "acc", "exact_match")
"""Metrics of tasks that are shares of right answers, of which ``accuracy`` is the mean."""
HEADLINES = (*ACCURACIES, "f1", "rougeL", "score")
"""Which of a task's metrics stands for it: the first of these that it has, else its first."""


@dataclass(frozen=True)
class Sample:
    """A metric of a point.

    Attributes:
        key: of the metric: the report's, ``TASK/METRIC`` or ``accuracy``; behind an ``@`` under which load or shape.
        better: ``more``, ``less``, or empty.
        runs: of each run, its values by unit (windows, needles, questions), all of one weight; a figure that is one
            number a run has the one unit ``run``.
        exact: it has no error: bits and bytes.
        documents: of the units that share one, by unit: they are no independent samples.
        log: the metric is exp of the values' mean: perplexity.

    """

    key: str
    better: str
    runs: tuple[dict[str, float], ...]
    exact: bool = False
    log: bool = False
    documents: dict[str, str] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Units of each run."""
        return len(self.runs[0])


@dataclass
class Measured:
    """A point on a kind of machine.

    Attributes:
        point: which.
        hardware: label.
        samples: by the metric's key.
        machines: that its steps ran on, as their results say.
        notes: what the reader should know, a line each.

    """

    point: Point
    hardware: str
    samples: dict[str, Sample] = field(default_factory=dict)
    machines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Result = Callable[[str], Path | None]
"""The folder of a step's result by its key; None if it is not done."""


def headline(metrics: Iterable[str]) -> str:
    """Return which metric stands for a task."""
    found = list(metrics)
    return next((one for start in HEADLINES for one in found if one.partition(",")[0] == start), found[0])


def by_task(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the metrics of each task among the keys of samples."""
    found: dict[str, list[str]] = {}
    for key in keys:
        task, slash, metric = key.partition("/")
        if slash and "@" not in key:
            found.setdefault(task, []).append(metric)
    return found


def asked_tasks(plan: Plan, tasks: Iterable[str]) -> list[str]:
    """Return the tasks that a plan names or has patterns of; what else was measured is part of one of these groups.

    A name without a result (one of several tasks, not of a group with a score) leaves all tasks.
    """
    tasks = list(tasks)
    asked = _by_pattern(plan, tasks).values()
    return tasks if not all(asked) else list(dict.fromkeys(task for found in asked for task in found))


def _by_pattern(plan: Plan, tasks: Collection[str]) -> dict[str, list[str]]:
    """Return which of the tasks each name or pattern of a plan means."""
    patterns = [str(task) for group in plan.tasks for task in _listed(group.get("tasks"))]
    return {pattern: [task for task in tasks if fnmatch(task, pattern)] for pattern in patterns}


def measured(graph: Graph, result: Result) -> list[Measured]:
    """Return what was measured of every point on every kind of machine.

    Args:
        graph: the study.
        result: finds results.

    """
    made = []
    for point in graph.points:
        for label in point.hardware:
            cells = [cell for cell in graph.cells if cell.point == point.name and cell.hardware == label]
            one = Measured(point, label)
            for key in dict.fromkeys(key for cell in cells for key in (cell.quality, *cell.tasks) if key):
                if (folder := result(key)) is not None:
                    _add_evaluation(one, folder)
            for name in graph.plan.loads:
                for key in dict.fromkeys(cell.loads[name] for cell in cells if name in cell.loads):
                    if (folder := result(key)) is not None:
                        _add_load(one, name, folder, first=name == next(iter(graph.plan.loads)))
            for key in dict.fromkeys(cell.served for cell in cells if cell.served):
                if (folder := result(key)) is not None:
                    _add_served(one, folder, first=not graph.plan.loads)
            for key in dict.fromkeys(cell.speed for cell in cells if cell.speed):
                if (folder := result(key)) is not None:
                    _add_speed(one, folder)
            _add_accuracy(one, graph)
            _add_derived(one, graph.plan.context_tokens)
            made.append(one)
    by_place = {(one.point.model, one.hardware): one for one in made if one.point.is_baseline}
    for one in made:
        base = by_place.get((one.point.model, one.hardware))
        if one is base:
            _compare_with_itself(one, made)
    return made


def _document(folder: Path, kind: type[Any]) -> Any:
    """Return the one document of a kind in a result's folder.

    Raises:
        ParetoError: there is none, or it cannot be read.

    """
    inputs = collect([folder])
    found = inputs.of(kind)
    if not found:
        raise ParetoError(f"{folder}: {inputs.skipped[0] if inputs.skipped else f'no {kind.__name__} in it'}")
    return found[0][1]


def _add(one: Measured, key: str, better: str, values: Mapping[str, float], **others: Any) -> None:
    """Add a run's values of a metric."""
    before = one.samples.get(key)
    runs = (*(before.runs if before else ()), dict(values))
    one.samples[key] = Sample(key, better, runs, **others)


def _put(one: Measured, key: str, better: str, figure: Figure | None, exact: bool = False) -> None:
    if figure is not None:
        _add(one, key, better, {"run": figure.value}, exact=exact)


def _tested(report: EvalReport, point: Point) -> ConfigurationResult:
    """Return the configuration of a report that is the point's; the other one is its baseline."""
    others = [result for result in report.configurations if not result.is_baseline]
    return report.configurations[0] if point.is_baseline or not others else others[0]


def _add_evaluation(one: Measured, folder: Path) -> None:
    report = _document(folder, EvalReport)
    result = _tested(report, one.point)
    one.machines.append(report.environment)
    kept_units = read_json(folder / UNITS)
    if kept_units is None:
        one.notes.append(
            f"{one.point.name}: {folder.parent.name}/{folder.name}/{UNITS} is missing or damaged; what it kept of "
            "single windows and answers has no interval, or no figure"
        )
        kept_units = {}
    units = (kept_units.get("configurations") or {}).get(result.name) or {}
    documents = (kept_units.get("documents") or {}).get(result.name) or {}
    for metric in METRICS:
        if metric.quality is None:
            continue
        kept = BY_UNIT.get(metric.key)
        if kept is not None:
            if kept in units:
                _add(one, metric.key, metric.better, units[kept], log=metric.key == "perplexity")
        elif metric.key not in one.samples or not result.tasks:
            # What is counted and not measured is the same in the evaluation of tasks.
            _put(one, metric.key, metric.better, metric.quality(result), exact=True)
    for task in result.tasks:
        key = f"{task.task}/{task.metric}"
        if key in units:
            _add(one, key, task.better, units[key], documents=documents.get(key, {}))
        else:
            _put(one, key, task.better, Figure(task.value.value))


def _add_load(one: Measured, name: str, folder: Path, *, first: bool) -> None:
    test = _document(folder, Summary)
    one.machines.append(test.environment)
    for stage in test.stages:
        last = first and stage is test.stages[-1]
        if stage.requests.failed:
            one.notes.append(f"{one.point.name}: {stage.requests.failed} requests of load {name} failed")
        for metric in METRICS:
            if metric.load is not None:
                for key in [f"{metric.key}@{name}/{stage_label(stage)}", *([metric.key] if last else [])]:
                    _put(one, key, metric.better, metric.load(stage))


def _add_speed(one: Measured, folder: Path) -> None:
    bench = _document(folder, KVBenchReport)
    one.machines.append(bench.environment)
    for dtype in bench.dtypes:
        same = plain_dtype(dtype.kv_cache_dtype) == plain_dtype(one.point.kv)
        if not same or (dtype.model is None) != (one.point.weights is None):
            continue
        if dtype.error:
            one.notes.append(f"{one.point.name}: its speed could not be measured: {dtype.error}")
        most = max((p.batch * p.context for p in dtype.points), default=0)
        for point in dtype.points:
            last = point.batch * point.context == most
            for metric in METRICS:
                if metric.speed is not None:
                    for key in [f"{metric.key}@{point.batch}x{point.context}", *([metric.key] if last else [])]:
                        _put(one, key, metric.better, metric.speed(dtype, point))
        _add_cache(one, dtype.kv_cache)


def _add_served(one: Measured, folder: Path, *, first: bool) -> None:
    """Add what was measured at the served endpoint; without load tests its largest load stands for the point."""
    bench = _document(folder, ServeBenchReport)
    one.machines.append(bench.environment)
    for dtype in bench.dtypes:
        if plain_dtype(dtype.kv_cache_dtype) != plain_dtype(one.point.kv):
            continue
        if dtype.error:
            one.notes.append(f"{one.point.name}: it could not be served: {dtype.error}")
        most = max((p.batch * p.context for p in dtype.points), default=0)
        for point in dtype.points:
            one.notes += [f"{one.point.name}: {note}" for note in point.notes]
            last = point.batch * point.context == most
            for metric in METRICS:
                if metric.served is not None:
                    whole = last and (first or metric.load is None)
                    under = f"{metric.key}@{users(point.batch)} of {point.context:,} tokens"
                    for key in [under, *([metric.key] if whole else [])]:
                        _put(one, key, metric.better, metric.served(dtype, point))
        _add_cache(one, dtype.kv_cache)


def _add_cache(one: Measured, cache: KVCache | None) -> None:
    """Add what a speed measurement found of the cache; an evaluation found the same."""
    for metric in METRICS:
        if metric.cache is not None and cache is not None and metric.key not in one.samples:
            _put(one, metric.key, metric.better, metric.cache(cache), exact=True)


def _add_accuracy(one: Measured, graph: Graph) -> None:
    """Add the mean over the plan's tasks, each counting alike, as values of which the plain mean is it.

    Every question keeps its distance from its task's mean, weighed by its task's size, around the mean of all tasks: so
    the spread of these values is that of a stratified sample.
    """
    metrics = by_task(one.samples)
    parts = []
    for asked in _by_pattern(graph.plan, metrics).values():
        if not asked:
            # Without one of its tasks it would be another figure than that of the other points.
            return
        keys = [f"{task}/{headline(metrics[task])}" for task in asked]
        parts += [one.samples[key] for key in keys if key.partition("/")[2].partition(",")[0] in ACCURACIES]
    if not parts:
        return
    count = max(len(part.runs) for part in parts)
    total = sum(part.units for part in parts)
    for run in range(count):
        values = [(part, part.runs[min(run, len(part.runs) - 1)]) for part in parts]
        means = [sum(found.values()) / len(found) for _, found in values]
        whole = sum(means) / len(means)
        if any(set(found) == {"run"} for _, found in values):
            # Without the single answers of a task nothing is known of the mean's error.
            _add(one, ACCURACY, MORE, {"run": whole})
            continue
        made = {
            f"{part.key}:{unit}": total / (len(parts) * part.units) * (value - mean) + whole
            for (part, found), mean in zip(values, means, strict=True)
            for unit, value in found.items()
        }
        shared = {f"{part.key}:{unit}": f"{part.key}:{doc}" for part in parts for unit, doc in part.documents.items()}
        _add(one, ACCURACY, MORE, made, documents=shared)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _add_derived(one: Measured, context_tokens: int) -> None:
    row = Row(one.point.name, one.point.model, one.point.kv)
    for sample in one.samples.values():
        if sample.key in BY_KEY:
            row.put(sample.key, Figure(sum(next(iter(run.values())) for run in sample.runs) / len(sample.runs)))
    for metric in METRICS:
        if metric.derived is not None:
            _put(one, metric.key, metric.better, metric.derived(row, context_tokens), exact=True)


def _compare_with_itself(base: Measured, others: list[Measured]) -> None:
    """Give a baseline what it has of comparisons with itself, unit by unit as the others have it."""
    for metric in METRICS:
        if metric.of_baseline is None or metric.key in base.samples:
            continue
        like = [
            one.samples[metric.key]
            for one in others
            if one.point.model == base.point.model and metric.key in one.samples
        ]
        if like:
            runs = tuple(dict.fromkeys(run, metric.of_baseline) for run in like[0].runs[:1])
            # What it has of itself is known without measuring: zeros are no answers that happened to be wrong.
            base.samples[metric.key] = Sample(metric.key, metric.better, runs, exact=True)
