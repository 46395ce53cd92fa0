"""Figures of tasks from the scores of their questions, compared with the baseline's question by question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.quality.schema import ConfigurationResult, Flips, TaskResult
from bench.quality.tasks.choices import Choice
from bench.quality.tasks.run import CALIBRATION, Scores
from bench.schema import Estimate
from bench.statistics import MARGIN, brier, calibrated, holm, mean_estimate, non_inferior, paired, proportion
from kv_cache.errors import ParetoError

BRIER, FLIPS = "brier", "flips"
OURS = (CALIBRATION, BRIER, FLIPS)
"""Metrics that are not lm-eval's: of the questions of multiple choice."""


def task_results(
    tested: Sequence[Scores], baseline: Sequence[Scores] | None, groups: dict[str, list[str]], margin: float = MARGIN
) -> list[TaskResult]:
    """Return the results of tasks, a group's all together behind its tasks.

    Args:
        tested: scores of one configuration.
        baseline: of the baseline, of the same tasks; None for the baseline itself.
        groups: by name, the names of their tasks.
        margin: the largest loss that does not matter, of scores between 0 and 1.

    Raises:
        ParetoError: the two answered other questions.

    """
    wholes, bases = list(tested), list(baseline or [])
    for name, tasks in groups.items():
        for scores in (wholes, bases):
            scores.extend(together(name, [one for one in scores if one.task in tasks]))
    found = {(one.task, one.metric): one for one in bases}
    return [
        row
        for one in wholes
        for row in _results(one, None if baseline is None else found.get((one.task, one.metric)), margin)
    ]


def adjusted(results: Sequence[ConfigurationResult], parts: Iterable[str]) -> list[ConfigurationResult]:
    """Return the results with p-values adjusted by Holm for how many of them an evaluation shows.

    All configurations and tasks are one table. What looks further into the same answers, the tasks of a group, and
    Brier scores and calibration errors, are tables of their own: else they would multiply the p-values of the first.

    Args:
        results: of all configurations.
        parts: names of tasks that stand in a group.

    """
    inside = set(parts)
    tables: dict[tuple[str, bool], list[TaskResult]] = {}
    for row in (row for result in results for row in result.tasks if row.p is not None):
        tables.setdefault((row.metric if row.metric in OURS else "", row.task in inside), []).append(row)
    found = {
        id(row): p
        for rows in tables.values()
        for row, p in zip(rows, holm([row.p or 0.0 for row in rows]), strict=True)
    }
    return [
        replace(result, tasks=[replace(row, p_holm=found.get(id(row))) for row in result.tasks]) for result in results
    ]


def together(name: str, scores: Sequence[Scores]) -> list[Scores]:
    """Return each metric over the questions of all tasks, as lm-eval weighs a group's tasks by their size."""
    made = []
    for metric in dict.fromkeys(one.metric for one in scores):
        parts = [one for one in scores if one.metric == metric]
        questions = {key: value for one in parts for key, value in one.questions.items()}
        choices = {key: value for one in parts for key, value in one.choices.items()}
        documents = {key: value for one in parts for key, value in one.documents.items()}
        if questions or choices:
            value = sum(questions.values()) / len(questions) if questions else 0.0
            read = sum(one.read for one in parts) / len(parts)
            made.append(Scores(name, metric, parts[0].better, value, questions, read, documents, choices))
    return made


def _results(score: Scores, base: Scores | None, margin: float) -> list[TaskResult]:
    """Return a metric's row, or those of what was chosen."""
    asked = score.questions or score.choices
    if base is not None and set(base.questions or base.choices) != set(asked):
        raise ParetoError(f"{score.task}: the baseline answered other questions; remove its scores and run again")
    if not score.choices:
        return [_row(score, base, margin)]
    rows = [_row(brier_scores(score), base and brier_scores(base), None)]
    if len(score.choices) > 1:
        rows.insert(0, _calibration(score, base))
    return rows if base is None else [*rows, _flips(score, base)]


def _row(score: Scores, base: Scores | None, margin: float | None) -> TaskResult:
    questions = score.questions
    clusters = _clusters(score, questions)
    values = list(questions.values())
    shares = bool(values) and set(values) <= {0.0, 1.0} and clusters is None
    if shares:
        value = proportion(round(sum(values)), len(values))
    else:
        value = mean_estimate(values, clusters) if values else Estimate(score.value, None, None, None, 1)
    row = _empty(score, len(questions), value)
    if base is None or not questions:
        return row
    before = [base.questions[key] for key in questions]
    compared = paired(values, before, clusters)
    gained, lost = (compared.more, compared.fewer) if score.better == "more" else (compared.fewer, compared.more)
    row = replace(row, change=compared.change, p=compared.p, gained=gained, lost=lost, smallest=compared.smallest)
    if margin is None or min(*values, *before) < 0 or max(*values, *before) > 1:
        return row
    return replace(row, margin=margin, verdict=non_inferior(compared.change, margin, score.better))


def _empty(score: Scores, questions: int, value: Estimate) -> TaskResult:
    return TaskResult(score.task, score.metric, score.better, questions, value, None, None, None, None, score.read)


def _clusters(score: Scores, questions: Iterable[str]) -> list[str] | None:
    """Return the document of each question; the question itself where it shares none."""
    return [score.documents.get(key, key) for key in questions] if score.documents else None


def brier_scores(score: Scores) -> Scores:
    """Return the Brier scores of what was chosen."""
    questions = {key: brier(one.probabilities, one.gold) for key, one in score.choices.items()}
    return replace(score, metric=BRIER, better="less", questions=questions, choices={})


def _calibration(score: Scores, base: Scores | None) -> TaskResult:
    def answers(choices: dict[str, Choice]) -> tuple[list[float], list[float]]:
        ordered = [choices[key] for key in score.choices]
        return [one.probabilities[one.chosen] for one in ordered], [float(one.right) for one in ordered]

    clusters = _clusters(score, score.choices)
    found = calibrated(answers(score.choices), None if base is None else answers(base.choices), clusters)
    row = _empty(score, len(score.choices), found.error)
    return replace(row, change=found.change, p=found.p, smallest=found.smallest)


def _flips(score: Scores, base: Scores) -> TaskResult:
    pairs = [(one, base.choices[key]) for key, one in score.choices.items()]
    changed = [(now, before) for now, before in pairs if now.chosen != before.chosen]
    clusters = _clusters(score, score.choices)
    moved = [float(now.chosen != before.chosen) for now, before in pairs]
    share = proportion(len(changed), len(pairs)) if clusters is None else mean_estimate(moved, clusters)
    flips = Flips(
        right_to_wrong=sum(before.right for _, before in changed),
        wrong_to_right=sum(now.right for now, _ in changed),
        wrong_to_wrong=sum(not now.right and not before.right for now, before in changed),
    )
    return replace(_empty(replace(score, metric=FLIPS, better="less"), len(pairs), share), flips=flips)
