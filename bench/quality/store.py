"""The finished pieces of an evaluation on disk, from which an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.files import read_arrays, read_json, write_json
from bench.quality.tasks.choices import Choice
from bench.quality.tasks.run import Scores, TaskSettings
from bench.quality.tasks.run import key as settings_key
from bench.schema import KVCache

Arrays = dict[str, np.ndarray]


def _scores(content: dict[str, Any]) -> Scores:
    return Scores(**{**content, "choices": {key: Choice(**one) for key, one in content["choices"].items()}})


class Store:
    """The finished pieces of one configuration in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def window_file(self, index: int) -> Path:
        """Return where a window's per-token figures lie."""
        return self.folder / f"window-{index:04d}.npz"

    def logits_file(self, index: int) -> Path:
        """Return where a baseline window's logits lie."""
        return self.folder / f"logits-{index:04d}.bin"

    def window(self, index: int, baseline: bool) -> Arrays | None:
        """Return a finished window's figures; None when it is to be measured."""
        arrays = read_arrays(self.window_file(index))
        if arrays is None or (baseline and not self.logits_file(index).is_file()):
            return None
        return arrays

    def answers(self) -> dict[int, str]:
        """Return the retrieval answers by trial."""
        content = read_json(self.folder / "needle.json")
        return {int(k): str(v) for k, v in content.items()} if isinstance(content, dict) else {}

    def add_answers(self, answers: dict[int, str]) -> None:
        """Keep retrieval answers."""
        write_json(self.folder / "needle.json", {str(k): v for k, v in sorted((self.answers() | answers).items())})

    def scores(self, task: str, settings: TaskSettings) -> list[Scores] | None:
        """Return a task's scores; None if it is to be asked."""
        content = read_json(self._scores_file(task, settings))
        try:
            return [_scores(one) for one in content] if isinstance(content, list) else None
        except (TypeError, KeyError, AttributeError):
            return None

    def add_scores(self, task: str, settings: TaskSettings, scores: Sequence[Scores]) -> None:
        """Keep a task's scores."""
        write_json(self._scores_file(task, settings), [asdict(one) for one in scores])

    def _scores_file(self, task: str, settings: TaskSettings) -> Path:
        return self.folder / f"task-{task.replace('/', '_')}-{settings_key(settings)}.json"

    def kv_cache(self) -> KVCache | None:
        """Return what the engine said of its KV cache."""
        content = read_json(self.folder / "kv_cache.json")
        try:
            return KVCache(**content)
        except TypeError:
            return None
