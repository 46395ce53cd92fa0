"""Which questions share a document: answers to them depend on each other, so that errors are counted by document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any


def columns(*names: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return what reads some columns of a question; None where it lacks one."""
    return lambda question: [question[name] for name in names] if all(name in question for name in names) else None


def squad_article(question: Mapping[str, Any]) -> Any:
    """Return the paragraphs of the article that a question of RULER's is about.

    RULER keeps a question's place in SQuAD alone. The other paragraphs of its article come first among what it is
    hidden in, so that all questions of an article share their text.
    """
    from lm_eval.tasks.ruler.qa_utils import read_squad

    # lm-eval keeps what it has read, to make the questions of it.
    found = read_squad()[0][question["index"]]
    return sorted({*found["context"], *found["more_context"]})


SHARED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "anli_": columns("premise"),
    "bbq": columns("category", "question_index"),  # A template, filled in with names.
    "belebele_": columns("flores_passage"),
    "boolq": columns("passage"),
    "drop": columns("passage"),
    "logiqa": columns("context"),
    "longbench_": columns("context"),
    "mlqa_": columns("context"),
    "multirc": columns("paragraph"),
    "narrativeqa": columns("document_id"),
    "qasper_": columns("title"),
    "record": columns("passage"),
    "ruler_qa_squad": squad_article,
    "social_iqa": columns("context"),
    "squadv2": columns("title"),
    "xquad_": columns("context"),
}
"""By the beginning of a task's name, what tells the document of a question."""


def document(task: str, question: Mapping[str, Any]) -> str | None:
    """Return a label that questions about the same document share; None where a question stands for itself.

    Args:
        task: lm-eval's name.
        question: as lm-eval's definition of the task has it.

    """
    name = next((name for name in SHARED if task.startswith(name)), None)
    found = None if name is None else SHARED[name](question)
    if found is None:
        return None
    return f"{name}/{hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:8]}"
