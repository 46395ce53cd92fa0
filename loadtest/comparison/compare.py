"""Changes from A to B, and verdicts on conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from loadtest.comparison.conditions import Condition, holm
from loadtest.comparison.side import Side, same_stages
from loadtest.errors import LoadTestError
from loadtest.results.console import load_name
from loadtest.statistics.batches import value
from loadtest.statistics.changes import Change, Difference
from loadtest.statistics.figures import Figure, parse_figure
from loadtest.statistics.samples import Samples

SHOWN = (
    "p50_ttft", "p95_ttft", "p99_ttft", "p50_tpot", "p95_tpot", "p95_itl", "p50_e2e", "p95_e2e", "p99_e2e",
    "requests_per_s", "output_tokens_per_s", "goodput", "error_rate",
)  # fmt: skip
"""The figures of a comparison's table; those of conditions are added."""
_SAME_LOAD = (
    "prompt_tokens", "output_tokens", "prefix_tokens", "prompts", "endpoint", "arrival", "burstiness", "warmup",
)  # fmt: skip
_LATE_MS = 10.0
FAILED, PASSED, OPEN = "failed", "passed", "not shown"


@dataclass(frozen=True)
class Row:
    """One figure of one stage."""

    load: str
    figure: Figure
    change: Change


@dataclass(frozen=True)
class Verdict:
    """What became of a condition at one stage.

    Attributes:
        condition: it.
        load: of the stage.
        outcome: ``failed``; ``passed``: the change is shown to be within the limit, or the value is; ``not shown``: the
            interval holds the limit, so that more or longer runs are needed to tell.
        message: the numbers, in one line.

    """

    condition: Condition
    load: str
    outcome: str
    message: str


@dataclass(frozen=True)
class Comparison:
    """Everything that is said of two sides."""

    a: Side
    b: Side
    steady: bool
    rows: list[Row]
    verdicts: list[Verdict]
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a condition holds that must not."""
        return any(verdict.outcome == FAILED for verdict in self.verdicts)


def compare(a: Side, b: Side, conditions: Sequence[Condition], steady: bool = False) -> Comparison:
    """Compare two sides stage by stage.

    Raises:
        LoadTestError: they have no load in common, or are too short or too unlike to be compared.

    """
    names = [*SHOWN, *(each.figure.name for each in conditions if each.figure.name not in SHOWN)]
    rows: list[Row] = []
    tests: list[tuple[Condition, str, Change, float]] = []
    verdicts: list[Verdict] = []
    for of_a, of_b in same_stages(a, b):
        load = load_name(of_a)
        sides = a.samples(of_a.index, steady), b.samples(of_b.index, steady)
        for name in dict.fromkeys(names):
            figure = parse_figure(name)
            if all(figure.applies(samples) for side in sides for samples in side):
                rows.append(Row(load, figure, _difference(*sides, figure).change()))
        for condition in conditions:
            _check(condition.figure, load, [*sides[0], *sides[1]])
            if condition.relative:
                difference = _difference(*sides, condition.figure)
                p = difference.p_above(condition.limit) if condition.above else difference.p_below(condition.limit)
                tests.append((condition, load, difference.change(), p))
            else:
                verdicts.append(judge_value(condition, load, sides[1]))
    rejected = holm([p for *_, p in tests])
    for (condition, load, change, p), failed in zip(tests, rejected, strict=True):
        verdicts.append(_judge_change(condition, load, change, p, failed))
    return Comparison(a, b, steady, rows, verdicts, _notes(a, b))


def judge_run(side: Side, conditions: Sequence[Condition], steady: bool = False) -> list[Verdict]:
    """Judge a run, or the mean of repeated ones, at each of its stages.

    Raises:
        LoadTestError: a condition is about a change, or a stage lacks the figure.

    """
    for condition in conditions:
        if condition.relative:
            raise LoadTestError(f"--fail-if {condition.text!r} is about a change: it needs --compare A B")
    verdicts = []
    for stage in side.stages:
        samples = side.samples(stage.index, steady)
        for condition in conditions:
            if all(len(each) and not each.ok.any() for each in samples) and condition.figure.kind in (
                "mean",
                "quantile",
            ):
                verdicts.append(Verdict(condition, load_name(stage), FAILED, "no request succeeded"))
                continue
            _check(condition.figure, load_name(stage), samples)
            verdicts.append(judge_value(condition, load_name(stage), samples))
    return verdicts


def judge_value(condition: Condition, load: str, runs: Sequence[Samples]) -> Verdict:
    """Judge an absolute condition by the figure itself, the mean over the runs."""
    found = fmean(value(samples, condition.figure) for samples in runs)
    outcome = FAILED if condition.broken_by(found) else PASSED
    return Verdict(condition, load, outcome, f"{condition.figure.name} is {shown(found, condition.figure)}")


def shown(number: float, figure: Figure) -> str:
    """Return a figure's value as text, with its unit."""
    if figure.kind == "fraction":
        return f"{number:.2%}"
    digits = 1 if abs(number) >= 100 else 2 if abs(number) >= 1 else 3
    return f"{number:.{digits}f}{' ms' if figure.unit == 'ms' else figure.unit}"


def shown_change(number: float | None, figure: Figure) -> str:
    """Return a change as text: in percent, and for fractions in percentage points."""
    if number is None or math.isnan(number):
        return "?"
    # Adding 0 makes the negative zero, which rounding leaves, a positive one.
    return f"{round(100 * number, 2) + 0.0:+.2f}{' points' if figure.kind == 'fraction' else '%'}"


def _check(figure: Figure, load: str, samples: Sequence[Samples]) -> None:
    if not all(figure.applies(each) for each in samples):
        need = "--goodput was not given" if figure.name.startswith("goodput") else "no request has one"
        raise LoadTestError(f"--fail-if: {load}: no {figure.name}: {need}")


def _difference(a: Sequence[Samples], b: Sequence[Samples], figure: Figure) -> Difference:
    try:
        return Difference(a, b, figure)
    except ValueError as error:
        raise LoadTestError(f"--compare: {error}; give both as many requests and --repeat") from error


def _judge_change(condition: Condition, load: str, change: Change, p: float, failed: bool) -> Verdict:
    figure = condition.figure
    low, high = shown_change(change.low, figure), shown_change(change.high, figure)
    said = f"{figure.name} {shown_change(change.change, figure)} (95% interval {low} to {high}, p = {p:.3g})"
    far = change.high if condition.above else change.low
    within = far is not None and (far <= condition.limit if condition.above else far >= condition.limit)
    return Verdict(condition, load, FAILED if failed else PASSED if within else OPEN, said)


def _notes(a: Side, b: Side) -> list[str]:
    notes = []
    if len(a.runs) == 1:
        notes.append(
            "one run each: the intervals hold the chance within these two, not what else differs from run to run; "
            "--repeat 5 holds both"
        )
    settings = [side.runs[0].summary.settings for side in (a, b)]
    for name in _SAME_LOAD:
        values = [each.get(name) for each in settings]
        if all(settings) and values[0] != values[1]:
            notes.append(f"--{name.replace('_', '-')} differs: {values[0]} and {values[1]}")
    for side in (a, b):
        for run in side.runs:
            if run.summary.status != "complete":
                notes.append(f"{run.path}: {run.summary.status}, so it is partial")
            lag = run.summary.generator.loop_lag_ms
            if lag is not None and lag.p99 > _LATE_MS:
                notes.append(
                    f"{run.path}: the load generator ran late (P99 {lag.p99:.0f} ms), so its machine was busy; what "
                    "that does to a run looks like a change of the server"
                )
    return notes
