"""Figures of tasks from the scores of their questions, compared with the baseline's question by question."""

from __future__ import annotations

from collections.abc import Sequence

from bench.quality.schema import TaskResult
from bench.quality.tasks.run import Scores
from bench.schema import Estimate
from bench.statistics import mean_estimate, paired
from kv_cache.errors import ParetoError


def task_results(
    tested: Sequence[Scores], baseline: Sequence[Scores] | None, groups: dict[str, list[str]]
) -> list[TaskResult]:
    """Return the results of tasks, a group's all together behind its tasks.

    Args:
        tested: scores of one configuration.
        baseline: of the baseline, of the same tasks; None for the baseline itself.
        groups: by name, the names of their tasks.

    Raises:
        ParetoError: the two answered other questions.

    """
    found = {(one.task, one.metric): one for one in baseline or []}
    made = [_result(one, None if baseline is None else found.get((one.task, one.metric))) for one in tested]
    for name, tasks in groups.items():
        whole = together(name, [one for one in tested if one.task in tasks])
        base = {one.metric: one for one in together(name, [one for one in baseline or [] if one.task in tasks])}
        made += [_result(one, base.get(one.metric)) for one in whole]
    return made


def together(name: str, scores: Sequence[Scores]) -> list[Scores]:
    """Return each metric over the questions of all tasks, as lm-eval weighs a group's tasks by their size."""
    made = []
    for metric in dict.fromkeys(one.metric for one in scores):
        parts = [one for one in scores if one.metric == metric]
        questions = {key: value for one in parts for key, value in one.questions.items()}
        if questions:
            value, read = sum(questions.values()) / len(questions), sum(one.read for one in parts) / len(parts)
            made.append(Scores(name, metric, parts[0].better, value, questions, read))
    return made


def _result(score: Scores, base: Scores | None) -> TaskResult:
    questions = score.questions
    value = mean_estimate(list(questions.values())) if questions else Estimate(score.value, None, None, None, 1)
    if base is None or not questions:
        return TaskResult(
            score.task, score.metric, score.better, len(questions), value, None, None, None, None, score.read
        )
    if set(base.questions) != set(questions):
        raise ParetoError(f"{score.task}: the baseline answered other questions; remove its scores and run again")
    compared = paired(list(questions.values()), [base.questions[key] for key in questions])
    gained, lost = (compared.more, compared.fewer) if score.better == "more" else (compared.fewer, compared.more)
    return TaskResult(
        score.task, score.metric, score.better, len(questions), value, compared.change, compared.p, gained, lost,
        score.read,
    )  # fmt: skip
