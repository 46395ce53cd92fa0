"""Pictures of a study: its frontiers for each kind of machine, and how a metric depends on one setting."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from bench.engine import plain_dtype
from bench.frontier import non_dominated
from bench.report.metrics import BY_KEY, MORE, TRADE_OFFS, TradeOff
from bench.report.plots import Place, line_plot
from bench.report.rows import Ends, Frontier
from bench.schema import Estimate
from bench.study import compare
from bench.study.plan import Chart, Plan
from bench.study.points import NONE, select
from bench.study.samples import ACCURACY, Measured

UNDER = "under"
"""The axis of a chart that shows a metric under each load or shape of its points."""


def frontiers(plan: Plan, found: Sequence[Measured], quality: str) -> dict[str, list[Frontier]]:
    """Return for each model and hardware label the trade-offs between quality and each cost that two points have."""
    made = {}
    for model, hardware in itertools.product(plan.models, plan.hardware):
        here = [one for one in found if one.hardware == hardware and one.point.model == model]
        name = f"{model} on {hardware}"
        drawn = [_frontier(trade, plan, here, quality, name) for trade in TRADE_OFFS]
        made[name] = [frontier for frontier in drawn if len(frontier.points) > 1]
    return made


def label(key: str) -> str:
    """Return what a metric is, with its unit."""
    if key == ACCURACY:
        return "accuracy, mean of the tasks"
    plain, at, under = key.partition("@")
    metric = BY_KEY.get(plain)
    text = key if metric is None else f"{metric.column or plain.replace('_', ' ')} ({metric.unit})"
    return f"{text} at {under}" if at and metric is not None else text


def _frontier(trade: TradeOff, plan: Plan, here: Sequence[Measured], quality: str, name: str) -> Frontier:
    places = []
    bars: dict[str, tuple[Ends, Ends]] = {}
    larger_x = BY_KEY[trade.metric].better == MORE if trade.metric in BY_KEY else False
    larger_y = quality == ACCURACY or (quality in BY_KEY and BY_KEY[quality].better == MORE)
    for one in here:
        if trade.metric in one.samples and quality in one.samples:
            x, y = compare.value(one.samples[trade.metric]), compare.value(one.samples[quality])
            places.append((one.point.name, x.value / trade.per, y.value))
            bars[one.point.name] = (_ends(x, trade.per), _ends(y))
    best = non_dominated([(-x if larger_x else x, -y if larger_y else y) for _, x, y in places])
    load = f"load {next(iter(plan.loads))}" if plan.loads else "the largest load"
    x_label = trade.label.format(context=plan.context_tokens, load=load)
    points = [(*place, on) for place, on in zip(places, best, strict=True)]
    key = re.sub(r"\W+", "-", f"{trade.key}-{name}")
    return Frontier(key, trade.title, x_label, label(quality), larger_x, points, larger_y, bars)


def _ends(estimate: Estimate, per: float = 1) -> Ends:
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return None
    return estimate.low / per, estimate.high / per


def sensitivity(plan: Plan, found: Sequence[Measured]) -> list[dict[str, str]]:
    """Return the plan's charts that have something to show: a title and an SVG each."""
    made = []
    for number, chart in enumerate(plan.charts):
        lines = _lines(chart, found)
        if lines:
            svg = line_plot(f"chart-{number}", chart.axis.replace("_", " "), label(chart.metric), lines)
            made.append({"title": chart.title, "svg": svg})
    return made


def _lines(chart: Chart, found: Sequence[Measured]) -> list[tuple[str, list[Place]]]:
    wanted = {(p.name, h) for p in select([one.point for one in found], chart.points) for h in p.hardware}
    lines: dict[str, list[Place]] = {}
    for one in found:
        if (one.point.name, one.hardware) not in wanted:
            continue
        if chart.axis == UNDER:
            named = [key for key in one.samples if key.startswith(f"{chart.metric}@")]
            lines[f"{one.point.name}{_where(one, found)}"] = [_place(key.partition("@")[2], one, key) for key in named]
            continue
        x = _axis(one, chart.axis)
        if x is not None and chart.metric in one.samples:
            lines.setdefault(_line(one, chart.axis, found), []).append(_place(x, one, chart.metric))
    for places in lines.values():
        if all(isinstance(x, float) for x, *_ in places):
            places.sort(key=lambda place: place[0])
    return [(name, places) for name, places in lines.items() if len(places) > 1]


def _place(x: float | str, one: Measured, key: str) -> Place:
    y = compare.value(one.samples[key])
    ends = _ends(y) or (None, None)
    return x, y.value, *ends


def _axis(one: Measured, axis: str) -> float | str | None:
    """Return where a point lies on an axis; None if it has no place there."""
    if axis in one.samples:
        return compare.value(one.samples[axis]).value
    value: Any = one.point.weights.setting(axis) if one.point.weights is not None else None
    if value is None or isinstance(value, (bool, list, str)):
        return None if value is None else str(value)
    return float(value)


def _line(one: Measured, axis: str, found: Sequence[Measured]) -> str:
    """Return the name of a point's line: of all that makes it another point, what is not the axis."""
    point = one.point
    words = [point.model] if len({other.point.model for other in found}) > 1 else []
    if axis != "weight_bits":
        if point.weights is None:
            words.append(NONE if axis == "kv_bits" else "")
        else:
            rest = [word for word in point.weights.name.split(" ")[1:] if not word.startswith(f"{axis}=")]
            words.append(" ".join([point.weights.group, *rest]))
    if axis != "kv_bits":
        words.append(f"{plain_dtype(point.kv)} KV")
    return ", ".join(word for word in words if word) + _where(one, found)


def _where(one: Measured, found: Sequence[Measured]) -> str:
    return f" on {one.hardware}" if len({other.hardware for other in found}) > 1 else ""
