"""What a study reads: models and files of data, where they lie and what tells their content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.files import read_json, write_json
from bench.study.plan import Model
from kv_cache.errors import ParetoError
from quant_methods.embedded import MODELS
from quant_methods.model_source import fingerprint, read_config, resolve_model, resolve_shape, weight_files

FILE_FLAGS = ("text", "data", "student-config", "haystack", "task-data", "prompts", "sensitivity-file")
"""Flags whose values are files or folders of data."""
BESIDE_TASKS = ("mmlu-test", "mmlu-dev", "gsm8k-test.jsonl", "truthfulqa.csv", "haystack")
"""What tasks also look for beside the folder of --task-data (bench/quality/tasks/sources.py)."""


@dataclass(frozen=True)
class FoundModel:
    """A model of a plan.

    Attributes:
        path: its folder; what the plan calls it where it is not here.
        fingerprint: of its files; made of its name where it is not here.
        parameters: roughly; 0 where not even its name tells.
        vocabulary: entries, 0 if unknown.
        here: whether it is.

    """

    path: str
    fingerprint: str
    parameters: float
    vocabulary: int
    here: bool


class Inputs:
    """Finds what a plan names.

    Args:
        folder: where the plan lies.
        data: where data lies, before that; None for there only.
        models: where models lie, before that.
        cache: file in which digests of large files are kept by name, size and time.
        tolerant: whether what is missing is only noted, for a look at a plan without its data.

    """

    def __init__(self, folder: Path, data: Path | None, models: Path | None, cache: Path, *, tolerant: bool) -> None:
        self.folder, self.data, self.models, self.tolerant = folder, data, models, tolerant
        self.missing: list[str] = []
        self._cache = cache
        known = read_json(cache)
        self._known: dict[str, str] = known if isinstance(known, dict) else {}

    def _absent(self, line: str) -> None:
        if not self.tolerant:
            raise ParetoError(line)
        if line not in self.missing:
            self.missing.append(line)

    def located(self, flags: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return flags with the paths of their files, and with digests of these files in the paths' place.

        Raises:
            ParetoError: a file is missing.

        """
        paths, digests = dict(flags), dict(flags)
        for name, value in flags.items():
            if str(name).replace("_", "-") in FILE_FLAGS:
                many = value if isinstance(value, list) else [value]
                found = [self._file(str(one), f"{where}.{name}") for one in many]
                if str(name).replace("_", "-") == "task-data":
                    beside = [Path(p).parent / other for p, _ in found for other in BESIDE_TASKS]
                    digests[f"{name} beside"] = [self._digest(place) for place in beside if place.exists()]
                paths[name] = [p for p, _ in found] if isinstance(value, list) else found[0][0]
                digests[name] = [d for _, d in found]
        return paths, digests

    def _file(self, name: str, where: str) -> tuple[str, str]:
        places = [place / name for place in (self.data, self.folder) if place is not None]
        for path in places:
            if path.exists():
                return str(path.resolve()), self._digest(path.resolve())
        looked = " or ".join(str(place) for place in places)
        self._absent(f"{where}: {looked}: no such file; --data DIR says where the plan's data lies")
        return name, f"missing {name}"

    def _digest(self, path: Path) -> str:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        stamp = hashlib.sha256()
        for file in files:
            stat = file.stat()
            stamp.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())

        def content() -> str:
            digest = hashlib.sha256()
            for file in files:
                with file.open("rb") as opened:
                    name = str(file.relative_to(path)) if path.is_dir() else ""
                    digest.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
            return digest.hexdigest()

        return self._remembered(stamp.hexdigest(), content)

    def _remembered(self, stamp: str, make: Any) -> str:
        if stamp not in self._known:
            self._known[stamp] = make()
            if not self.tolerant:
                write_json(self._cache, self._known)
        return self._known[stamp]

    def model(self, name: str, model: Model, *, quantized: bool = False) -> FoundModel:
        """Return where a model lies; one of the hub is fetched unless this is only a look.

        Args:
            name: the plan's key.
            model: what the plan says of it.
            quantized: accept one that is quantized already.

        Raises:
            ParetoError: it is not to be found.

        """
        places = [place / model.path for place in (self.models, self.folder) if place is not None]
        local = next((str(place.resolve()) for place in places if place.is_dir()), None)
        path = local or model.path
        if self.tolerant and local is None and not Path(path).is_dir() and not (MODELS / path).is_dir():
            self._absent(f"{name}: {path} is not here; --models DIR says where models lie")
            return FoundModel(path, f"missing {path}", _guess(f"{name} {path}"), 0, False)
        try:
            folder = resolve_shape(path) if model.shape else resolve_model(path, quantized=quantized)
        except ParetoError as error:
            self._absent(f"{name}: {error}")
            return FoundModel(path, f"missing {path}", _guess(f"{name} {path}"), 0, False)
        config = read_config(folder)
        vocabulary = int((config.get("text_config") or config).get("vocab_size") or 0)
        if model.shape:
            mark = f"shape {hashlib.sha256((folder / 'config.json').read_bytes()).hexdigest()}"
            return FoundModel(path, mark, _guess(f"{name} {path}"), vocabulary, True)
        files = weight_files(folder)
        stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        stamp = hashlib.sha256(repr((stats, (folder / "config.json").read_bytes())).encode()).hexdigest()
        mark = self._remembered(stamp, lambda: fingerprint(folder))
        # An embedded name stays a name, which every machine knows.
        return FoundModel(path, mark, sum(size for _, size, _ in stats) / 2, vocabulary, True)


def _guess(name: str) -> float:
    """Return the parameters that a name tells, such as 7b or 135M; 0 if it tells none."""
    match = re.search(r"(\d+(?:\.\d+)?)([bm])\b", name.lower())
    return float(match[1]) * (1e9 if match[2] == "b" else 1e6) if match else 0.0
