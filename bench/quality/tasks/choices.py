"""What a model chose in multiple choice, and how sure it was: for calibration errors and for answers that change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.special import softmax


@dataclass(frozen=True)
class Choice:
    """The answer to a question of multiple choice.

    Attributes:
        probabilities: of each choice, from 0 to 1, together 1: the softmax of the choices' log-likelihoods.
        chosen: the likeliest choice, from 0, as lm-eval's ``acc`` takes it.
        gold: the right one.

    """

    probabilities: list[float]
    chosen: int
    gold: int

    @property
    def right(self) -> bool:
        """Return whether the right one was chosen."""
        return self.chosen == self.gold


def choice(task: Any, sample: Mapping[str, Any]) -> Choice | None:
    """Return what was chosen in a sample that lm-eval logged; None of a task that is no choice of one right answer.

    Tasks with a scoring of their own (TruthfulQA's mc2, BBQ) count several choices as right, or add choices up.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return None
    question = sample["doc"]
    choices = task.doc_to_choice(question)
    # The likelihoods of choices without their question, for acc_mutual_info, stand behind.
    found = [float(value) for value, _ in sample["filtered_resps"][: len(choices)]]
    gold = task.doc_to_text(question) if task.multiple_input else task.doc_to_target(question)
    if isinstance(gold, list) and len(gold) == 1:
        gold = gold[0]
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices) or len(found) != len(choices):
        return None
    # What is kept has digits enough for a Brier score's sixth.
    probabilities = [round(float(p), 7) for p in softmax(found)]
    return Choice(probabilities, max(range(len(found)), key=found.__getitem__), gold)
