"""Questions of this project's tasks, from the files of ``--task-data``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kv_cache.errors import ParetoError


def rows(
    file: str,
    columns: Iterable[str],
    task_data: str | None = None,
    where: Mapping[str, str] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Return a task's questions as lm-eval takes them from a ``custom_dataset``.

    Args:
        file: where they lie under the folder, JSON lines.
        columns: what each must have.
        task_data: the folder.
        where: columns and their values, of the questions that are wanted.
        others: what else a definition says.

    Raises:
        ParetoError: there is no such file, or it holds something else.

    """
    found = read(file, columns, task_data)
    return dataset([row for row in found if all(row[key] == value for key, value in (where or {}).items())], file)


def read(file: str, columns: Iterable[str], task_data: str | None) -> list[dict[str, Any]]:
    """Return the rows of a file of the folder; the errors are those of :func:`rows`."""
    needed = list(columns)
    path = place(file, task_data)
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        missing = [key for key in needed if key not in row] if isinstance(row, dict) else needed
        if line.strip() and missing:
            raise ParetoError(f"{path}, line {number}: each line must be a JSON object with {', '.join(needed)}")
        found += [row] if row else []
    return found


def place(file: str, task_data: str | None) -> Path:
    """Return a file or folder under the folder of ``--task-data``.

    Raises:
        ParetoError: there is none.

    """
    if task_data is None:
        raise ParetoError(f"the questions are not on the hub: give --task-data DIR with DIR/{file}")
    path = Path(task_data) / file
    if not path.exists():
        raise ParetoError(f"--task-data {task_data} has no {file}")
    return path


def dataset(found: list[dict[str, Any]], file: str) -> dict[str, Any]:
    """Return rows as a data set of one split, ``test``."""
    from datasets import Dataset

    if not found:
        raise ParetoError(f"{file} holds none of the questions that are asked for")
    return {"test": Dataset.from_list(found)}
