"""Asks a running engine the questions of tasks, and keeps each question's score."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.quality.tasks import ruler, sources
from bench.quality.tasks.choices import Choice, choice
from bench.quality.tasks.documents import document
from kv_cache.errors import ParetoError

CALIBRATION = "ece"
"""The metric that keeps what was chosen."""
KEPT = 2
"""What is kept of a question; scores of an earlier form are asked for again."""
ALL = "*"
"""Fits every name."""
OWN = Path(__file__).parent / "own"
"""This project's definitions of tasks."""


@dataclass(frozen=True)
class TaskSettings:
    """What is asked.

    Attributes:
        tasks: lm-eval's names of tasks and groups, * and ? as in a shell.
        data: folder of their questions; None for the hub.
        limit: questions of a task, the first ones, by a task's or group's name or a pattern of names; the last that
            fits counts. Of tasks that none fits, all are asked.
        num_fewshot: examples before each question, in the same form. Tasks that none fits are shown what they say
            themselves.
        chat: whether questions are put into the model's chat template.
        max_model_len: longest context in tokens.
        seed: of the choice of examples.

    """

    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: tuple[tuple[str, int], ...] = ()
    num_fewshot: tuple[tuple[str, int], ...] = ()
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
        settings: by task, with its own numbers of questions and examples.

    """

    tasks: dict[str, Any]
    groups: dict[str, list[str]]
    settings: dict[str, TaskSettings]


def choose(settings: TaskSettings, tokenizer: Path | None, work: Path) -> Chosen:
    """Find and load tasks, with a look at the first question of each.

    Args:
        settings: what is asked.
        tokenizer: folder of the model's; tasks that make their questions to a length, or count tokens, need it.
        work: an empty folder, for definitions.

    Raises:
        ParetoError: lm-eval or what a task needs of it is missing, a name matches nothing, or the data is missing or of
            another task.

    """
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ParetoError("--tasks needs lm-eval: pip install 'vllm-pareto[tasks]'") from error
    for name in ("lm_eval", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A bar for each of a hundred files says nothing of the evaluation.
    datasets.disable_progress_bars()
    if settings.data is not None and not Path(settings.data).is_dir():
        raise ParetoError(f"--task-data {settings.data}: no such folder")
    metadata = {"tokenizer": str(tokenizer), "max_seq_lengths": [settings.max_model_len], "task_data": settings.data}
    manager = TaskManager(include_path=str(OWN), metadata=metadata)
    named = _named(manager, settings.tasks)
    limits = _by_task(manager, named, settings.limit, "--task-limit")
    fewshot = _by_task(manager, named, settings.num_fewshot, "--num-fewshot")
    names, definitions = _defined(manager, named, settings, limits, work)
    # lm-eval takes seconds to read its own definitions: those of this run take their places without a second time.
    written = TaskManager(include_path=str(sources.write(definitions, work)), include_defaults=False).task_index
    manager.task_index.update({name: entry for name, entry in written.items() if entry.kind.name != "TAG"})
    tasks: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        loaded = _load(manager, name, settings.data)
        tasks |= loaded["tasks"]
        if name in loaded["groups"]:
            groups[name] = [task.task_name for task in loaded["groups"][name].get_all_tasks()]
    for name, task in tasks.items():
        _look_at(name, task, settings.data)
        if name in fewshot and task.config.num_fewshot != 0:
            task.set_config(key="num_fewshot", value=fewshot[name])
        scoring = task.config.process_results
        if callable(scoring) and "tokenizer" in inspect.signature(scoring).parameters:
            task.set_config(key="process_results", value=functools.partial(scoring, tokenizer=_tokenizer(tokenizer)))
    own = {
        name: replace(settings, limit=_of_all(limits.get(name)), num_fewshot=_of_all(fewshot.get(name)))
        for name in tasks
    }
    return Chosen(tasks, groups, own)


def _of_all(number: int | None) -> tuple[tuple[str, int], ...]:
    return () if number is None else ((ALL, number),)


def number_of(pairs: Sequence[tuple[str, int]]) -> int | None:
    """Return the number of a task's own settings."""
    return pairs[-1][1] if pairs else None


def _by_task(known: Any, names: Iterable[str], pairs: Iterable[tuple[str, int]], flag: str) -> dict[str, int]:
    """Return a flag's number by task, of those tasks for which one was given."""
    leaves = {name: _leaves(known, [name]) for name in names}
    found: dict[str, int] = {}
    for pattern, number in pairs:
        fitting = [
            leaf for name, own in leaves.items() for leaf in own if fnmatch(name, pattern) or fnmatch(leaf, pattern)
        ]
        if not fitting:
            raise ParetoError(f"{flag} {pattern}={number}: {pattern} is none of the --tasks")
        found |= dict.fromkeys(fitting, number)
    return found


def _named(known: Any, patterns: Iterable[str]) -> list[str]:
    """Return the names of tasks, groups and tags that are asked for."""
    names: list[str] = []
    for pattern in patterns:
        found = [name for name in known.task_index if fnmatch(name, pattern)]
        if not found:
            close = get_close_matches(pattern, known.task_index, 1)
            raise ParetoError(
                f"--tasks {pattern}: no such task in lm-eval {version('lm-eval')} or here"
                f"{f'; did you mean {close[0]}?' if close else ' (lm-eval ls tasks)'}"
            )
        names += [name for name in found if name not in names]
    return names


def _defined(
    known: Any, names: Iterable[str], settings: TaskSettings, limits: Mapping[str, int], work: Path
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return what is to be loaded, and the definitions of those tasks that take their questions from elsewhere.

    A task that was named must have its files; of a group or tag those that have none are left out, with a line.
    """
    chosen: list[str] = []
    definitions: dict[str, dict[str, Any]] = {}
    for name in names:
        leaves, without = _leaves(known, [name]), []
        for leaf in leaves:
            entry = known.task_index[leaf]
            source, says = Path(str(entry.yaml_path)), entry.cfg or {}
            change: dict[str, Any] = {"include": str(source), "task": leaf}
            if ruler.is_ruler(source):
                change |= ruler.changes(says, settings.max_model_len, settings.seed, limits.get(leaf))
            elif OWN in source.parents or settings.data is None:
                continue
            elif files := sources.files_of(leaf, Path(settings.data), work):
                change = sources.definition(source, leaf, says, files)
            else:
                without.append(leaf)
                continue
            definitions[leaf] = change
        if without == leaves:
            place = f"{settings.data}/{name}"
            raise ParetoError(
                f"--task-data {settings.data} has no questions of {name}: {place}/test.jsonl or validation.jsonl"
            )
        if without:
            print(f"{name}: without {', '.join(without)}: not in {settings.data}", file=sys.stderr, flush=True)
        chosen += [leaf for leaf in leaves if leaf not in without] if without else [name]
    return list(dict.fromkeys(chosen)), list(definitions.values())


def _load(manager: Any, name: str, data: str | None) -> Any:
    try:
        with ruler.local_nltk(data):
            return manager.load([name])
    except ParetoError as error:
        raise ParetoError(f"{name}: {error}") from error
    except ImportError as error:
        raise ParetoError(f"{name} needs more of lm-eval ({_line(error)}): pip install 'vllm-pareto[tasks]'") from error
    # Every library that reads data raises exceptions of its own.
    except Exception as error:
        hint = "; --task-data DIR takes them from files" if data is None else f", taken from {data}"
        raise ParetoError(f"the questions of {name} cannot be loaded ({_line(error)}){hint}") from error


def _look_at(name: str, task: Any, data: str | None) -> None:
    """Form the first question, so that files of something else are seen before an engine starts."""
    try:
        first = next(iter(task.eval_docs))
        task.doc_to_text(first)
        task.doc_to_target(first)
        if task.OUTPUT_TYPE == "multiple_choice":
            task.doc_to_choice(first)
    # Templates and the tasks' own functions raise whatever a row makes them raise.
    except Exception as error:
        place = f" in {data}" if data else ""
        raise ParetoError(f"{name}: the first question{place} is not one of this task ({_line(error)})") from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _tokenizer(folder: Path | None) -> Any:
    from quant_methods.calibration.text_source import load_tokenizer

    if folder is None:
        raise ParetoError("a task counts tokens: it needs the model's tokenizer")
    return load_tokenizer(folder)


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
    """Return what tells a task's scores under these settings, its own, from those under others."""
    determining = {
        **asdict(settings), "tasks": None, "limit": number_of(settings.limit),
        "num_fewshot": number_of(settings.num_fewshot), "lm_eval": version("lm-eval"), "kept": KEPT,
        "own": _own_definitions(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def _own_definitions() -> str:
    """Return a digest of this project's tasks: scores of earlier ones are not theirs."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(OWN.glob("*.*")))).hexdigest()


def ask(
    llm: Any, task: Any, settings: TaskSettings, warm: bool, capacity: int, note: Callable[[str], object]
) -> list[Scores]:
    """Return a task's scores, one a metric.

    Args:
        llm: a ``vllm.LLM`` with prefix caching; idle.
        task: of :func:`choose`.
        settings: what is asked, the task's own of :func:`choose`.
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
    chat = settings.chat or bool((task.config.metadata or {}).get("chat") and scorer.tokenizer.chat_template)
    with contextlib.redirect_stderr(io.StringIO()), _compiled_once():
        found = evaluate(
            scorer,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=number_of(settings.limit),
            bootstrap_iters=0,
            apply_chat_template=chat,
            verbosity="ERROR",
        )
    assert found is not None
    if scorer.cut:
        most = scorer.max_length
        print(f"{name}: prompts longer than {most:,} tokens that were cut: {scorer.cut:,}", file=sys.stderr, flush=True)
    read = scorer.read / scorer.asked if warm and scorer.asked else 1.0
    return scores(name, task, found["results"][name], found["samples"][name], read)


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
    """Let lm-eval compile each template once: it compiles it for every question and example."""
    from lm_eval.utils import env

    with patch.object(env, "from_string", functools.cache(env.from_string)):
        yield


def scores(
    name: str, task: Any, values: dict[str, Any], samples: Sequence[dict[str, Any]], read: float
) -> list[Scores]:
    """Return the scores that lm-eval's results of a task hold.

    Args:
        name: the task's.
        task: itself.
        values: its ``results``.
        samples: its ``samples``.
        read: share of the contexts' tokens that were read back from the KV cache.

    """
    means = {m["metric"] for m in task.config.metric_list if m.get("aggregation", "mean") == "mean"}
    made = []
    keys = [f"{name}/{sample['doc_id']}/{sample['doc_hash'][:8]}" for sample in samples]
    labels = {key: document(name, sample["doc"]) for key, sample in zip(keys, samples, strict=True)}
    documents = {key: label for key, label in labels.items() if label is not None}
    for label, value in values.items():
        metric, _, chosen = label.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        # BBQ's figures of the kinds of bias that its questions don't show.
        if math.isnan(value):
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
