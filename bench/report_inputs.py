"""Finds and reads result files for the report; what cannot be used gets one clear line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import kv_bench_schema, schema

LOADTEST = "vllm-pareto/loadtest/1"
RECIPE_FILE = "pareto_recipe.json"
REPORT = "vllm-pareto/report/1"
COMPRESSION = "pareto_recipe"
Document = dict[str, Any]


@dataclass
class Inputs:
    """Usable documents by kind, each with its file, and a line for every file left out."""

    evals: list[tuple[Path, Document]] = field(default_factory=list)
    loadtests: list[tuple[Path, Document]] = field(default_factory=list)
    kv_benches: list[tuple[Path, Document]] = field(default_factory=list)
    recipes: list[tuple[Path, Document]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def usable(self) -> int:
        """Return how many documents there are."""
        return len(self.evals) + len(self.loadtests) + len(self.kv_benches) + len(self.recipes)


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
                _read(file, inputs)
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


def _read(file: Path, inputs: Inputs) -> None:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        inputs.skipped.append(f"{file}: cannot be read ({error.strerror or error})")
        return
    except UnicodeDecodeError:
        inputs.skipped.append(f"{file}: not a JSON file")
        return
    except ValueError as error:
        inputs.skipped.append(f"{file}: not valid JSON, perhaps cut short ({error})")
        return
    name = document.get("schema") if isinstance(document, dict) else None
    if name == REPORT:
        return  # An earlier report in the same folder is no input, and no mistake either.
    if file.name == RECIPE_FILE and isinstance(document, dict) and "recipe" in document:
        name = COMPRESSION
    kinds: dict[str, tuple[list[tuple[Path, Document]], Callable[[Document], None]]] = {
        schema.SCHEMA: (inputs.evals, _check_eval),
        LOADTEST: (inputs.loadtests, _check_loadtest),
        kv_bench_schema.SCHEMA: (inputs.kv_benches, _check_kv_bench),
        COMPRESSION: (inputs.recipes, _check_recipe),
    }
    if name not in kinds:
        known = [k for k in kinds if isinstance(name, str) and k.rsplit("/", 1)[0] == name.rsplit("/", 1)[0]]
        if known:
            inputs.skipped.append(f"{file}: schema {name} is of another version; this one reads {known[0]}")
        else:
            inputs.skipped.append(f"{file}: not a result of pareto eval, loadtest, kv-bench or compress")
        return
    target, check = kinds[name]
    try:
        check(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        inputs.skipped.append(f"{file}: claims to be {name} but lacks or misspells a field ({error!r})")
        return
    target.append((file, document))


def _number(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")


def _check_eval(document: Document) -> None:
    for row in document["configurations"]:
        str(row["name"]), str(row["model"]["name"]), str(row["kv_cache"]["dtype"]), bool(row["is_baseline"])
        _number(row["model"]["weight_bytes"])
        for key in ("tokens", "memory_bytes", "budget_bytes", "bytes_per_token"):
            _number(row["kv_cache"][key])
        texts = [*row["texts"], *([row["overall"]] if row["overall"] else [])]
        for text in texts:
            for key in ("perplexity", "perplexity_change", "kl", "top1_agreement"):
                if text[key] is not None:
                    _number(text[key]["value"])
        if row["needle"]:
            _number(row["needle"]["accuracy"]["value"])
            for cell in row["needle"]["cells"]:
                for value in (cell["length"], cell["depth"], cell["accuracy"]["value"]):
                    _number(value)
    for failure in document.get("failed", ()):
        str(failure["name"]), str(failure["error"])
    dict(document["environment"]), dict(document["settings"])


def _check_loadtest(document: Document) -> None:
    str(document["label"]), str(document["server"]["model"]), dict(document["server"]["cache_config"])
    for stage in document["stages"]:
        stage["concurrency"], stage["rate"], stage["requests"]["ok"], stage["requests"]["failed"]
        for key in ("ttft_ms", "tpot_ms"):
            if stage["latency"][key] is not None:
                for percentile in ("p50", "p90", "p95", "p99"):
                    _number(stage["latency"][key][percentile])
        if stage["throughput"] is not None:
            _number(stage["throughput"]["output_tokens_per_s"])


def _check_kv_bench(document: Document) -> None:
    str(document["model"]), str(document["baseline"])
    for row in document["dtypes"]:
        str(row["kv_cache_dtype"]), row["error"], row["capacity_ratio"], str(row.get("fingerprint"))
        for point in row["points"]:
            for value in (point["step_ms"]["median"], point["prefill_tokens_per_s"]["median"]):
                _number(value)
            _number(point["batch"] * point["context"])
            point["step_ratio"], point["prefill_ratio"]


def _check_recipe(document: Document) -> None:
    str(document["model"]), dict(document["recipe"]), str(document["model_sha256"])
