"""NarrativeQA (Kočiský et al. 2018): questions on stories, asked with the story's summary or with the whole book."""

from __future__ import annotations

from functools import cache
from typing import Any

from bench.quality.tasks.own.data import dataset, place, read

QUESTIONS, SUMMARIES, BOOKS = "narrativeqa/questions.jsonl", "narrativeqa/summaries.jsonl", "books"


def summaries(task_data: str | None = None, **others: Any) -> dict[str, Any]:
    """Return the questions with their stories' summaries as the context; errors as of :func:`.data.rows`."""
    texts = {row["document_id"]: row["summary"] for row in read(SUMMARIES, ("document_id", "summary"), task_data)}
    return _with_contexts(texts, task_data)


def books(task_data: str | None = None, **others: Any) -> dict[str, Any]:
    """Return the questions of those books whose text is there as ``books/GUTENBERG_ID.txt``; errors as above."""
    stories = read(SUMMARIES, ("document_id", "gutenberg_id"), task_data)
    paths = {row["document_id"]: place(BOOKS, task_data) / f"{row['gutenberg_id']}.txt" for row in stories}
    texts = {key: path.read_text(encoding="utf-8") for key, path in paths.items() if path.is_file()}
    return _with_contexts(texts, task_data)


def _with_contexts(texts: dict[str, str], task_data: str | None) -> dict[str, Any]:
    """Return the questions of these texts in turn, so that the first few are not all of one."""
    turns: dict[str, int] = {}
    found = []
    for row in read(QUESTIONS, ("document_id", "question", "answers"), task_data):
        story = row["document_id"]
        if story in texts:
            turns[story] = turns.get(story, -1) + 1
            found.append((turns[story], {**row, "context": texts[story]}))
    return dataset([row for _, row in sorted(found, key=lambda one: one[0])], QUESTIONS)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return how much of an answer's words are one of the right answers', the better one's.

    ``f1`` is that of words without articles and punctuation, as SQuAD counts it; ``rouge_l`` the F-measure of the
    longest common subsequence (Lin 2004), which NarrativeQA's authors report.
    """
    from transformers.data.metrics.squad_metrics import compute_f1

    answer = results[0].strip()
    f1 = max(float(compute_f1(gold, answer)) for gold in doc["answers"])
    return {"f1": f1, "rouge_l": float(_rouge().score_multi(doc["answers"], answer)["rougeL"].fmeasure)}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
