"""Renders a study: one HTML page without any outside resource, the same for the same records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.engine import plain_dtype
from bench.report import plots
from bench.report.figures import NONE, Figure
from bench.report.metrics import BY_KEY, METRICS
from bench.report.page import described, page_template
from bench.report.rows import Row
from bench.report.table import DASH, Cell, cells, columns
from bench.study import compare
from bench.study.charts import frontiers, label, sensitivity
from bench.study.plan import Plan
from bench.study.samples import Measured, asked_tasks, by_task, headline
from bench.study.schema import FALSIFIED, HELD, Comparison, Decided, Improvement, Study
from bench.study.steps import Graph
from bench.study.verdicts import quality_metric


def render(study: Study, graph: Graph, found: Sequence[Measured]) -> str:
    """Return the page's HTML.

    Args:
        study: its result.
        graph: its points and steps.
        found: what it was made from.

    """
    plan, quality = graph.plan, quality_metric(graph.plan, found)
    study, found = _shortened(study, found)
    used = {key for one in found for key in one.samples}
    grouped = columns(metric for metric in METRICS if metric.key in used)
    machines = list(dict.fromkeys(one.hardware for one in found))
    improving = sum(one.improves for one in study.improvements)
    return page_template("bench.study", "study.html.j2").render(
        title=study.title,
        description=plan.description,
        study=study,
        done=sum(step.status == "done" for step in study.steps),
        hypotheses=[
            (h.name if i == 0 else "", _decided(h.verdict if i == 0 else "", one))
            for h in study.hypotheses
            for i, one in enumerate(h.points)
        ],
        quality=label(quality),
        margin=f"{plan.improvement.margin:g}",
        load="the last stage of the plan's first load" if plan.loads else "the largest load that was served",
        improving=f"{improving} of {len(study.improvements)} points improve.",
        improvements=[(_place(one, machines), _improvement(one)) for one in study.improvements],
        frontiers={
            hardware: [
                {"title": f.title, "svg": plots.frontier_plot(f), "best": "; ".join(p[0] for p in f.points if p[3])}
                for f in drawn
            ]
            for hardware, drawn in frontiers(plan, found, quality).items()
        },
        headings=["point", *(heading for heading, _ in grouped)],
        tables=[
            (hardware, [(_named(one), cells(_row(one), grouped)) for one in found if one.hardware == hardware])
            for hardware in machines
        ],
        tasks=_tasks(plan, study, found),
        comparisons=[(_place(one, machines), _comparison(one)) for one in study.comparisons],
        charts=sensitivity(plan, found),
        failed=[
            (s.name, [Cell(s.status), Cell(s.reason[:300])]) for s in study.steps if s.status != "done" or s.reason
        ],
        environments=[described(name, one) for name, many in study.machines.items() for one in many],
    )


def _shortened(study: Study, found: Sequence[Measured]) -> tuple[Study, list[Measured]]:
    """Leave out the model's name at the start of points' names where all are of one model."""
    models = {one.point.model for one in found}
    start = f"{next(iter(models))}, " if len(models) == 1 else ""

    def named(one: Any, *names: str) -> Any:
        return replace(one, **{name: (getattr(one, name) or "").removeprefix(start) for name in names})

    hypotheses = [replace(h, points=[named(one, "point", "against") for one in h.points]) for h in study.hypotheses]
    return replace(
        study,
        hypotheses=hypotheses,
        improvements=[named(one, "point") for one in study.improvements],
        comparisons=[named(one, "point") for one in study.comparisons],
    ), [replace(one, point=named(one.point, "name")) for one in found]


def _named(one: Measured) -> str:
    return one.point.name + (" (baseline)" if one.point.is_baseline else "")


def _place(one: Improvement | Comparison, machines: list[str]) -> str:
    return f"{one.point} on {one.hardware}" if len(machines) > 1 else one.point


def _row(one: Measured) -> Row:
    """Return a point as the report's table takes it."""
    row = Row(one.point.name, one.point.model, plain_dtype(one.point.kv), one.point.is_baseline)
    for key, sample in one.samples.items():
        found = compare.value(sample)
        note = "" if sample.exact else None
        if key in BY_KEY:
            row.put(key, Figure(found.value, note, found.standard_error, found.low, found.high, found.n))
    return row


def _decided(verdict: str, one: Decided) -> list[Cell]:
    ends = NONE if one.low is None or one.high is None else f"{one.low:.4g} to {one.high:.4g}"
    best = one.verdict == HELD
    mark = {HELD: "held", FALSIFIED: "falsified"}.get(one.verdict, "not decidable")
    return [
        Cell(verdict, best=verdict == HELD),
        Cell(one.point, one.hardware),
        Cell(one.against or NONE),
        Cell(NONE if one.value is None else f"{one.value:.4g}", mark, best),
        Cell(ends, one.why),
        Cell(str(one.runs)),
    ]


def _improvement(one: Improvement) -> list[Cell]:
    costs = [f"{label(key).partition(' (')[0]} {factor:.2f}x" for key, factor in one.costs.items()]
    return [
        Cell("yes" if one.improves else "no", one.why_not, one.improves),
        Cell(NONE if one.change is None else f"{one.change.value:+.4g}", _ends(one.change)),
        Cell(_p(one.p_quality)),
        Cell(costs[0] if costs else NONE, "; ".join(costs[1:])),
        Cell("exact" if one.p_cost == 0 else _p(one.p_cost)),
        Cell(_p(one.p)),
        Cell(_p(one.p_holm)),
    ]


def _comparison(one: Comparison) -> list[Cell]:
    form = "{:.4g}x" if one.measure == "ratio" else "{:+.4g}"
    return [
        Cell(one.metric), Cell(form.format(one.change.value)), Cell(_ends(one.change)), Cell(_p(one.p)),
        Cell(_p(one.p_holm)),
        Cell(one.verdict if one.p is not None else "nothing tells the error", best=one.verdict == "better"),
    ]  # fmt: skip


def _ends(estimate: Any) -> str:
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.4g} to {estimate.high:.4g}"


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _tasks(plan: Plan, study: Study, found: Sequence[Measured]) -> dict[str, Any]:
    """Return the table of tasks: a line a task with the metric that stands for it, a column a point.

    What groups consist of has its lines apart.
    """
    names = by_task(dict.fromkeys(key for one in found for key in one.samples))
    keys = [f"{task}/{headline(metrics)}" for task, metrics in names.items()]
    here = [one for one in found if any(key in one.samples for key in keys)]
    # Quality is measured on one kind of machine, so that others repeat it.
    here = [one for one in here if one.hardware == here[0].hardware]
    tested = {(c.point, c.hardware, c.metric): c for c in study.comparisons}
    asked = {f"{task}/{headline(names[task])}" for task in asked_tasks(plan, names)}
    rows: list[tuple[str, list[Cell]]] = []
    parts: list[tuple[str, list[Cell]]] = []
    for key in keys:
        line = []
        for one in here:
            if key not in one.samples:
                line.append(DASH)
                continue
            value, c = compare.value(one.samples[key]), tested.get((one.point.name, one.hardware, key))
            error = "" if value.standard_error is None else f" ± {value.standard_error:.4f}"
            line.append(
                Cell(f"{value.value:.4f}{error}", "" if c is None else f"{c.change.value:+.4f}, p {_p(c.p_holm)}")
            )
        (rows if key in asked else parts).append((key, line))
    return {"headings": ["task", *(_named(one) for one in here)], "rows": rows, "parts": parts}
