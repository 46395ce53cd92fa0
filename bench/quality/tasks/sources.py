"""Where tasks get their questions: lm-eval's own definitions with data from the hub, or with a folder's files.

Files lie as ``DIR/TASK/SPLIT.jsonl`` (or ``.csv``), TASK as lm-eval names it and SPLIT one of train, validation, test
and dev; a task whose files are laid out otherwise has an entry in ``LAYOUTS``. Only where questions come from changes:
prompts, choices and metrics stay lm-eval's. RULER's questions are made (``ruler.py``); the tasks of this project say
themselves what they read (``own``).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from bench.quality.tasks import ruler
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
    places = (folder / task / "test.jsonl", folder / "gsm8k" / "test.jsonl")
    test = _present(*places, *(place / "gsm8k-test.jsonl" for place in (folder, folder.parent)))
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


def _longbench(folder: Path, task: str, work: Path) -> dict[str, Path]:
    test = _present(folder / "longbench" / f"{task.removeprefix('longbench_')}.jsonl", folder / task / "test.jsonl")
    return {"test": test} if test else {}


def _bbq(folder: Path, task: str, work: Path) -> dict[str, Path]:
    test = _present(folder / "bbq" / "test.jsonl")
    return {"test": test} if test else {}


_LETTERS = "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:"
LAYOUTS: dict[str, tuple[Callable[[Path, str, Path], dict[str, Path]], dict[str, Any]]] = {
    "bbq": (_bbq, {}),
    "gsm8k": (_gsm8k, {}),
    # A prompt that is too long loses its middle, as LongBench's authors cut it (Bai et al. 2024).
    "longbench_": (_longbench, {"num_fewshot": 0, "generation_kwargs": {"truncation": "middle"}}),
    "mmlu_": (_mmlu, {"doc_to_text": _LETTERS}),
    "truthfulqa_mc": (_truthfulqa, {}),
}
"""By the beginning of a task's name: what finds its files, and what its definition says otherwise because of them."""


def files_of(task: str, folder: Path, work: Path) -> dict[str, Path]:
    """Return a task's files by split; empty if the folder has none that questions could be taken from.

    Raises:
        ParetoError: they are of two kinds.

    """
    files = _layout(task)[0](folder, task, work)
    if len({path.suffix for path in files.values()}) > 1:
        raise ParetoError(f"{task}: the files of its splits must all be .jsonl or all .csv")
    return files if set(files) & {"test", "validation"} else {}


def _layout(task: str) -> tuple[Callable[[Path, str, Path], dict[str, Path]], dict[str, Any]]:
    return next((found for name, found in LAYOUTS.items() if task.startswith(name)), (_plain, {}))


def definition(source: Path, task: str, known: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """Return the definition of a task with local files.

    Args:
        source: lm-eval's own, which it includes.
        task: lm-eval's name.
        known: what the source says.
        files: by split.

    """
    changes = {
        key: {**(known.get(key) or {}), **value} if isinstance(value, dict) else value
        for key, value in _layout(task)[1].items()
    }
    return {
        "include": str(source),
        "task": task,
        "dataset_path": "csv" if {path.suffix for path in files.values()} == {".csv"} else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
        **{key: split if split in files else None for key, split in SPLIT_KEYS.items()},
        **changes,
    }


def write(definitions: Iterable[dict[str, Any]], work: Path) -> Path:
    """Write definitions into a folder, and return where; lm-eval takes them for its own."""
    folder = work / "definitions"
    folder.mkdir()
    for one in definitions:
        text = yaml.dump(one, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        (folder / f"{one['task']}.yaml").write_text(text, encoding="utf-8")
    return folder


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(ruler.Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))
