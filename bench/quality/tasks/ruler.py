"""RULER (Hsieh et al. 2024) as lm-eval makes it, at the length of ``--task-context`` and from local texts.

lm-eval makes 500 questions at a time, draws them from the global generators and downloads what it hides them in. Here
its own functions make as many as are asked, from a seed, and read ``--task-data``: essays from ``haystack/*.txt`` in
the folder or beside it, cut into sentences with nltk's ``nltk_data/tokenizers/punkt_tab``, and documents from
``ruler/squad*.json`` and ``ruler/hotpotqa*.json``. Without a folder lm-eval downloads them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from kv_cache.errors import ParetoError

RESERVE = 128
"""Tokens left for a chat template, for the beginning of the answer and, in fwe, for the answer: RULER counts none."""
MAKERS = ("generate_samples", "sys_word_pair_random", "sys_vartrack_w_noise_random", "sys_kwext")
"""lm-eval's functions that make questions, by the name of their module's."""


def is_ruler(source: Path) -> bool:
    """Return whether a definition is one of RULER's."""
    return source.parent.name == "ruler" and source.parent.parent.name == "tasks"


def changes(definition: dict[str, Any], context: int, seed: int, samples: int | None) -> dict[str, Any]:
    """Return what a task's definition says otherwise here.

    Args:
        definition: lm-eval's, functions as their paths.
        context: the engine's longest context in tokens; the metric is named by it, as RULER's are.
        seed: of the questions.
        samples: how many; None for RULER's 500.

    """
    part = str(definition["process_results"]).endswith("_part")
    return {
        "custom_dataset": Function("bench.quality.tasks.ruler.questions"),
        "process_results": Function(f"bench.quality.tasks.ruler.{'any_is_there' if part else 'all_are_there'}"),
        "num_fewshot": 0,
        "metric_list": [{"metric": str(context), "aggregation": "mean", "higher_is_better": True}],
        "metadata": {
            "version": 1.0, "made_by": Path(str(definition["custom_dataset"])).name, "length": context - RESERVE,
            "seed": seed, "samples": samples or 500,
        },
    }  # fmt: skip


class Function(str):
    """A function's whole path, which YAML marks ``!function``."""


def questions(made_by: str, length: int, seed: int, samples: int, task_data: str | None = None, **others: Any) -> Any:
    """Return a task's questions as lm-eval makes them.

    Args:
        made_by: lm-eval's module and function.
        length: tokens of question and answer together.
        seed: of the generators that lm-eval draws from.
        samples: at most so many.
        task_data: folder of the texts; None to let lm-eval download them.
        others: what else lm-eval's function takes, among it the ``tokenizer``'s place.

    Raises:
        ParetoError: a text is missing, or the context is too short for the task.

    """
    module, _, name = made_by.rpartition(".")
    # lm-eval downloads what nltk needs when it is imported, needed or not.
    with local_nltk(task_data):
        make = getattr(importlib.import_module(f"lm_eval.tasks.ruler.{module}"), name)
    space = make.__globals__
    replaced: dict[str, Any] = {maker: _fewer(space[maker], samples) for maker in MAKERS if maker in space}
    if "RNG" in space:
        replaced["RNG"] = random.Random(seed)
    if task_data is not None and "get_haystack" in space:
        whole = space["get_haystack"]
        replaced["get_haystack"] = lambda type_haystack: (
            essays(Path(task_data)) if type_haystack == "essay" else whole(type_haystack)
        )
    if task_data is not None and "download_json" in space:
        replaced["download_json"] = lambda url: documents(Path(task_data), "squad" if "SQuAD" in url else "hotpotqa")
        space["read_squad" if "squad" in name else "read_hotpotqa"].cache_clear()
    random.seed(seed)
    np.random.seed(seed)
    quiet = io.StringIO()
    with patch.dict(space, replaced), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        made = make(max_seq_lengths=[length], **{k: v for k, v in others.items() if k != "max_seq_lengths"})
    if not all(made["test"]["outputs"]):
        raise ParetoError("the context has no room for what is to be found: give a longer --task-context")
    return made


def _fewer(make: Callable[..., Any], samples: int) -> Callable[..., Any]:
    def made(*args: Any, **settings: Any) -> Any:
        most = min(samples, settings.get("num_samples", samples), len(settings.get("qas", range(samples))))
        return make(*args, **{**settings, "num_samples": most})

    return made


@contextlib.contextmanager
def local_nltk(task_data: str | None) -> Iterator[None]:
    """Let nltk look into a folder, if one is given, and download nothing then."""
    if task_data is None:
        yield
        return
    import nltk

    folder = str((Path(task_data) / "nltk_data").resolve())
    if folder not in nltk.data.path:
        nltk.data.path.insert(0, folder)
    with patch.object(nltk, "download", lambda *args, **settings: False):
        yield


def essays(task_data: Path) -> list[str]:
    """Return the words of the essays that needles are hidden in.

    Raises:
        ParetoError: there are none, or nothing to cut them into sentences with.

    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise ParetoError(
            "essays are cut into sentences by nltk's punkt_tab: unpack nltk_data's punkt_tab.zip as "
            f"{task_data}/nltk_data/tokenizers/punkt_tab"
        ) from error
    folders = [place / "haystack" for place in (task_data, task_data.resolve().parent)]
    paths = next((found for folder in folders if (found := sorted(folder.glob("*.txt")))), None)
    if paths is None:
        raise ParetoError(f"needles are hidden in essays: put texts to {folders[0]}/*.txt")
    text = " ".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return re.sub(r"\s+", " ", text).strip().split(" ")


def documents(task_data: Path, name: str) -> Any:
    """Return SQuAD 2.0's or HotpotQA's (distractor) development set.

    Raises:
        ParetoError: there is no such file, or it is no JSON.

    """
    paths = sorted((task_data / "ruler").glob(f"{name}*.json"))
    if not paths:
        raise ParetoError(f"put the development set to {task_data}/ruler/{name}*.json, as its authors publish it")
    try:
        return json.loads(paths[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise ParetoError(f"{paths[0]} is no JSON: {error}") from error


def all_are_there(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the share of the wanted strings that the answer holds."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    return {str(doc["max_length"] + RESERVE): string_match_all(postprocess_pred(results), [doc["outputs"]])}


def any_is_there(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the answer holds one of the right answers, as lm-eval scores the questions on documents."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_part

    return {str(doc["max_length"] + RESERVE): string_match_part(postprocess_pred(results), [doc["outputs"]])}
