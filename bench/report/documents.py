"""Finds result files and reads them into the documents that wrote them; what cannot be used gets one line each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from bench.quality.schema import SCHEMA as EVAL
from bench.quality.schema import EvalReport
from bench.quality.units import SCHEMA as UNITS
from bench.speed.schema import SCHEMA as KV_BENCH
from bench.speed.schema import KVBenchReport
from bench.speed.served_schema import SCHEMA as SERVE_BENCH
from bench.speed.served_schema import ServeBenchReport
from loadtest.results.schema import SCHEMA as LOADTEST
from loadtest.results.schema import Summary

RECIPE_FILE = "pareto_recipe.json"
COMPRESSION = "pareto_recipe"
REPORT = "vllm-pareto/report/2"


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint's ``pareto_recipe.json`` says of how it was made, as far as the report shows it.

    Attributes:
        model: what was compressed.
        model_sha256: of its weights.
        recipe: steps, each with its method and settings.
        calibration: text, samples and tokens; None without any.

    """

    model: str
    model_sha256: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None = None


KINDS: dict[str, type] = {
    EVAL: EvalReport, LOADTEST: Summary, KV_BENCH: KVBenchReport, SERVE_BENCH: ServeBenchReport, COMPRESSION: Recipe,
}  # fmt: skip
"""What a document's ``schema`` makes of it."""
Document = EvalReport | Summary | KVBenchReport | ServeBenchReport | Recipe
Kind = TypeVar("Kind", EvalReport, Summary, KVBenchReport, ServeBenchReport, Recipe)


@dataclass
class Inputs:
    """Usable documents, each with its file, and a line for every file left out."""

    documents: list[tuple[Path, Document]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def of(self, kind: type[Kind]) -> list[tuple[Path, Kind]]:
        """Return the documents of a kind."""
        return [(path, document) for path, document in self.documents if isinstance(document, kind)]


def collect(paths: Sequence[Path]) -> Inputs:
    """Read result files and folders, folders with everything below them."""
    inputs = Inputs()
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            found = list(_candidates(path))
            if not found:
                inputs.skipped.append(f"{path}: no result files in this folder")
        elif path.exists():
            found = [path]
        else:
            inputs.skipped.append(f"{path}: no such file or folder")
            continue
        for file in found:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                read = _read(file)
                if isinstance(read, str):
                    inputs.skipped.append(f"{file}: {read}")
                elif read is not None:
                    inputs.documents.append((file, read))
    return inputs


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield the JSON files of a folder tree that may be results: of a checkpoint's folder only its recipe."""
    for path in sorted(folder.rglob("*.json")):
        inside = path.relative_to(folder).parts
        if any(part.startswith(".") for part in inside):
            continue
        if (path.parent / "config.json").is_file() and path.name != RECIPE_FILE:
            continue
        yield path


def _read(file: Path) -> Document | str | None:
    """Return a file's document, or why there is none; None for what is no input and no mistake either, as a report."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except UnicodeDecodeError:
        return "not a JSON file"
    except ValueError as error:
        return f"not valid JSON, perhaps cut short ({error})"
    name = content.get("schema") if isinstance(content, dict) else None
    family = name.rsplit("/", 1)[0] if isinstance(name, str) else None
    if family in (REPORT.rsplit("/", 1)[0], UNITS.rsplit("/", 1)[0]):
        return None
    if file.name == RECIPE_FILE and isinstance(content, dict) and "recipe" in content:
        name = COMPRESSION
    if name not in KINDS:
        known = [kind for kind in KINDS if kind.rsplit("/", 1)[0] == family]
        if known:
            return f"schema {name} is of another version; this one reads {known[0]}"
        return "not a result of pareto eval, loadtest, kv-bench, serve-bench or compress"
    try:
        return parse(KINDS[name], text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"claims to be {name} but lacks or misspells a field ({where}: {first['msg']})"


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def parse(kind: type[Kind], text: str) -> Kind:
    """Return what JSON says, checked field by field; fields that are not known are passed over.

    Raises:
        pydantic.ValidationError: a field is missing or of another type.

    """
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return cast("Kind", _ADAPTERS[kind].validate_json(text, strict=True))
