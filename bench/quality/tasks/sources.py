"""Where tasks get their questions: lm-eval's own definitions with data from the hub, or with a folder's files.

Files lie as ``DIR/TASK/SPLIT.jsonl`` (or ``.csv``), TASK as lm-eval names it and SPLIT one of train, validation, test
and dev; a task whose files are laid out otherwise has an entry in ``LAYOUTS``. Only where questions come from changes:
prompts, choices and metrics stay lm-eval's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from kv_cache.errors import ParetoError

SPLITS = ("train", "validation", "test", "dev")
SPLIT_KEYS = {"training_split": "train", "validation_split": "validation", "test_split": "test", "fewshot_split": "dev"}
"""lm-eval's names of splits, and which of a folder's splits they are where the task names none."""


def _present(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _plain(folder: Path, task: str, work: Path) -> dict[str, Path]:
    found = {}
    for split in SPLITS:
        path = _present(*(folder / task / f"{split}.{ending}" for ending in ("jsonl", "csv")))
        if path:
            found[split] = path
    return found


def _gsm8k(folder: Path, task: str, work: Path) -> dict[str, Path]:
    test = _present(folder / task / "test.jsonl", folder / "gsm8k" / "test.jsonl", folder.parent / "gsm8k-test.jsonl")
    train = _present(folder / "gsm8k" / "train.jsonl")
    return {split: path for split, path in (("test", test), ("train", train)) if path}


def _mmlu(folder: Path, task: str, work: Path) -> dict[str, Path]:
    subject = task.removeprefix("mmlu_")
    test = _present(*(place / "mmlu-test" / f"{subject}_test.csv" for place in (folder, folder.parent)))
    dev = _present(*(place / "mmlu-dev" / f"{subject}_dev.csv" for place in (folder, folder.parent)))
    return {split: path for split, path in (("test", test), ("dev", dev)) if path}


def _truthfulqa(folder: Path, task: str, work: Path) -> dict[str, Path]:
    """Make the two kinds of multiple choice of the authors' TruthfulQA.csv (Lin et al. 2022)."""
    source = _present(folder / "truthfulqa.csv", folder.parent / "truthfulqa.csv")
    if source is None:
        return {}

    def answers(text: str) -> list[str]:
        return [part.strip() for part in text.split(";") if part.strip()]

    made = work / "truthfulqa.jsonl"
    with source.open(encoding="utf-8-sig", newline="") as rows, made.open("w", encoding="utf-8") as out:
        for row in csv.DictReader(rows):
            best, right, wrong = (
                row["Best Answer"].strip(),
                answers(row["Correct Answers"]),
                answers(row["Incorrect Answers"]),
            )
            one = {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)}
            many = {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}
            out.write(json.dumps({"question": row["Question"], "mc1_targets": one, "mc2_targets": many}) + "\n")
    return {"validation": made}


_LETTERS = "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:"
LAYOUTS: dict[str, tuple[Callable[[Path, str, Path], dict[str, Path]], dict[str, Any]]] = {
    "gsm8k": (_gsm8k, {}),
    "mmlu_": (_mmlu, {"doc_to_text": _LETTERS}),
    "truthfulqa_mc": (_truthfulqa, {}),
}
"""By the beginning of a task's name: what finds its files, and what its definition says otherwise because of them."""


def local_definitions(tasks: Iterable[tuple[str, Path]], folder: Path, work: Path) -> Path:
    """Write definitions of tasks with a folder's files, and return where; lm-eval takes them for its own.

    Args:
        tasks: names, and the files of lm-eval's definitions, which the written ones include.
        folder: of the data.
        work: an empty folder.

    Raises:
        ParetoError: a task has no files there.

    """
    definitions = work / "definitions"
    definitions.mkdir()
    for task, source in tasks:
        find, changes = next((found for name, found in LAYOUTS.items() if task.startswith(name)), (_plain, {}))
        files = find(folder, task, work)
        if not set(files) & {"test", "validation"}:
            raise ParetoError(
                f"--task-data {folder} has no questions of {task}: {folder / task}/test.jsonl or validation.jsonl"
            )
        kinds = {path.suffix for path in files.values()}
        if len(kinds) > 1:
            raise ParetoError(f"{task}: the files of its splits must all be .jsonl or all .csv")
        definition = {
            "include": str(source),
            "task": task,
            "dataset_path": "csv" if kinds == {".csv"} else "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
            **{key: split if split in files else None for key, split in SPLIT_KEYS.items()},
            **changes,
        }
        (definitions / f"{task}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False, allow_unicode=True))
    return definitions
