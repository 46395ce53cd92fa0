"""Asks a running engine the questions of tasks, and keeps each question's score."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.quality.tasks.choices import Choice, choice
from bench.quality.tasks.documents import document
from bench.quality.tasks.sources import local_definitions
from kv_cache.errors import ParetoError

CALIBRATION = "ece"
"""The metric that keeps what was chosen."""
KEPT = 2
"""What is kept of a question; scores of an earlier form are asked for again."""


@dataclass(frozen=True)
class TaskSettings:
    """What is asked.

    Attributes:
        tasks: lm-eval's names of tasks and groups, * and ? as in a shell.
        data: folder of their questions; None for the hub.
        limit: questions of each task, the first ones; None for all.
        num_fewshot: examples before each question; None for what each task says.
        chat: whether questions are put into the model's chat template.
        max_model_len: longest context in tokens.
        seed: of the choice of examples.

    """

    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    max_model_len: int = 4096
    seed: int = 1234


@dataclass(frozen=True)
class Scores:
    """A task's scores of one metric.

    Attributes:
        task: lm-eval's name.
        metric: lm-eval's name, with the filter of answers behind a comma where it is not ``none``.
        better: ``more`` or ``less``.
        value: of all questions together, as the task adds them up.
        questions: score by question; of a task whose value is no mean of them, empty.
        read: share of the contexts' tokens that were read back from the KV cache.
        documents: by question the label of its document, of those that share one with others.
        choices: by question what was chosen; only of the metric ``ece``, whose value is made of them.

    """

    task: str
    metric: str
    better: str
    value: float
    questions: dict[str, float]
    read: float
    documents: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """Tasks that were found.

    Attributes:
        tasks: by name, ready to ask.
        groups: by name, the names of all their tasks.

    """

    tasks: dict[str, Any]
    groups: dict[str, list[str]]


def choose(settings: TaskSettings, work: Path) -> Chosen:
    """Find and load tasks.

    Args:
        settings: what is asked.
        work: an empty folder, for definitions.

    Raises:
        ParetoError: lm-eval is missing, a name matches nothing, or the data is missing.

    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ParetoError("--tasks needs lm-eval: pip install 'vllm-pareto[tasks]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = TaskManager()
    names = []
    for pattern in settings.tasks:
        found = [name for name in known.task_index if fnmatch(name, pattern)]
        if not found:
            raise ParetoError(f"--tasks {pattern}: lm-eval {version('lm-eval')} has no such task (lm-eval ls tasks)")
        names += [name for name in found if name not in names]
    manager = known
    if settings.data is not None:
        folder = Path(settings.data)
        if not folder.is_dir():
            raise ParetoError(f"--task-data {folder}: no such folder")
        leaves = [(name, Path(str(known.task_index[name].yaml_path))) for name in _leaves(known, names)]
        manager = TaskManager(include_path=str(local_definitions(leaves, folder, work)))
    try:
        loaded = manager.load(names)
    except (OSError, ConnectionError) as error:
        raise ParetoError(
            f"the questions of {', '.join(names)} cannot be loaded ({str(error)[:200]}); --task-data DIR takes them "
            "from files"
        ) from error
    for task in loaded["tasks"].values():
        if settings.num_fewshot is not None and task.config.num_fewshot != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
    groups = {name: [task.task_name for task in group.get_all_tasks()] for name, group in loaded["groups"].items()}
    return Chosen(loaded["tasks"], {name: groups[name] for name in names if name in groups})


def _leaves(manager: Any, names: Iterable[str]) -> list[str]:
    """Return the names of the tasks that tasks, groups and tags stand for, without loading their questions."""
    found: list[str] = []
    for name in names:
        entry = manager.task_index[name]
        inner = (
            (entry.cfg or {}).get("task") or (entry.cfg or {}).get("task_list") if entry.kind.name == "GROUP" else None
        )
        if inner:
            words = [one if isinstance(one, str) else one.get("task") or one.get("group") for one in inner]
            found += _leaves(manager, [word for word in words if word in manager.task_index])
        elif entry.kind.name == "TAG":
            found += _leaves(manager, [n for n, e in manager.task_index.items() if name in e.tags and n != name])
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def key(settings: TaskSettings) -> str:
    """Return what tells a task's scores under these settings from those under others."""
    determining = {**asdict(settings), "tasks": None, "lm_eval": version("lm-eval"), "kept": KEPT}
    return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:12]


def ask(
    llm: Any, task: Any, settings: TaskSettings, warm: bool, capacity: int, note: Callable[[str], object]
) -> list[Scores]:
    """Return a task's scores, one a metric.

    Args:
        llm: a ``vllm.LLM`` with prefix caching; idle.
        task: of :func:`choose`.
        settings: what is asked.
        warm: whether contexts have to be read from the prefix cache to be read from codes, as on a GPU.
        capacity: tokens that the KV cache holds.
        note: told how far it is.

    """
    from lm_eval.evaluator import evaluate

    from bench.quality.tasks.scorer import EngineScorer

    scorer = EngineScorer(llm, warm, capacity, note)
    name = task.task_name
    # Examples are drawn anew for each question: without this, the next configuration would be shown other ones.
    task.set_fewshot_seed(seed=settings.seed)
    with contextlib.redirect_stderr(io.StringIO()):
        found = evaluate(
            scorer,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=settings.limit,
            bootstrap_iters=0,
            apply_chat_template=settings.chat,
            verbosity="ERROR",
        )
    assert found is not None
    read = scorer.read / scorer.asked if warm and scorer.asked else 1.0
    return _scores(name, task, found["results"][name], found["samples"][name], read)


def _scores(
    name: str, task: Any, values: dict[str, Any], samples: Sequence[dict[str, Any]], read: float
) -> list[Scores]:
    means = {m["metric"] for m in task.config.metric_list if m.get("aggregation", "mean") == "mean"}
    made = []
    keys = [f"{name}/{sample['doc_id']}/{sample['doc_hash'][:8]}" for sample in samples]
    labels = {key: document(name, sample["doc"]) for key, sample in zip(keys, samples, strict=True)}
    documents = {key: label for key, label in labels.items() if label is not None}
    for label, value in values.items():
        metric, _, chosen = label.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        questions = {
            key: float(sample[metric])
            for key, sample in zip(keys, samples, strict=True)
            if sample["filter"] == chosen and metric in means
        }
        better = "more" if task.higher_is_better().get(metric, True) else "less"
        metric = metric if chosen == "none" else label
        made.append(Scores(name, metric, better, float(value), questions, read, documents if questions else {}))
    found = {key: choice(task, sample) for key, sample in zip(keys, samples, strict=True)}
    choices = {key: one for key, one in found.items() if one is not None}
    if choices:
        made.append(Scores(name, CALIBRATION, "less", 0.0, {}, read, documents, choices))
    return made


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for definitions, which lies as long as its tasks are used."""
    return tempfile.TemporaryDirectory(prefix="pareto-tasks-")
