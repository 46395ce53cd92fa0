"""What every window, needle and question of an evaluation gave: the units of which its figures are means.

``units.json`` beside ``eval.json`` has them, so that configurations of different evaluations are compared unit by unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.quality.needle import Trial, is_correct
from bench.quality.tasks.figures import brier_scores, together
from bench.quality.tasks.run import Scores

RESULT, SCHEMA = "units.json", "vllm-pareto/units/1"


def of(
    windows: Sequence[tuple[str, Mapping[str, Any]]],
    trials: Sequence[Trial],
    answers: Mapping[int, str],
    scores: Sequence[Scores],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, float]]:
    """Return each figure's values by unit.

    Args:
        windows: name and per-token figures of each.
        trials: the needles' prompts.
        answers: by trial.
        scores: of tasks.
        groups: names of their tasks, by group.

    Returns:
        ``nll`` in nats a token, and for a tested configuration ``kl`` and ``top1``, by window; ``needle``, 1 for a
        number that was found, by trial; ``TASK/METRIC`` by question, a group's behind its tasks'.

    """
    made: dict[str, dict[str, float]] = {}
    for figure in ("nll", "kl", "top1"):
        found = {name: float(arrays[figure].mean()) for name, arrays in windows if len(arrays[figure])}
        if found:
            made[figure] = found
    if trials:
        names = [f"{trial.length}/{trial.depth:g}/{i}" for i, trial in enumerate(trials)]
        made["needle"] = {
            name: float(is_correct(trial, answers[i]))
            for i, (name, trial) in enumerate(zip(names, trials, strict=True))
        }
    for score in with_groups(scores, groups):
        if score.questions:
            made[f"{score.task}/{score.metric}"] = dict(score.questions)
    return made


def documents(scores: Sequence[Scores], groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """Return by ``TASK/METRIC`` the documents of the questions that share one with others, where there are any."""
    found = with_groups(scores, groups)
    return {f"{score.task}/{score.metric}": dict(score.documents) for score in found if score.documents}


def with_groups(scores: Sequence[Scores], groups: Mapping[str, Sequence[str]]) -> list[Scores]:
    """Return the scores of tasks with those of their groups behind them, and Brier scores of what was chosen."""
    whole = [one for name, tasks in groups.items() for one in together(name, [s for s in scores if s.task in tasks])]
    return [brier_scores(one) if one.choices else one for one in (*scores, *whole)]
