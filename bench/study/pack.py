"""The reproducibility pack of a study: all that a second machine needs to check it, and to repeat it.

A tar with the plan, the steps' records (not the checkpoints, of which it has the hashes), the result and the page,
``pack.json`` with what was run where, and ``SHA256SUMS`` over everything. The same records give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from bench.environment import commit, versions
from bench.files import read_json, replacing
from bench.study.folder import LOG, RECORD, Folder
from bench.study.outcome import PAGE, PLAN, STUDY, conclude
from bench.study.plan import load_plan
from bench.study.points import Point
from bench.study.run import BEFORE, FAILED, SKIPPED, Progress, State
from bench.study.step import Cell, Step
from bench.study.steps import Graph, make_points
from kv_cache.errors import ParetoError

SCHEMA = "vllm-pareto/pack/1"
MANIFEST, SUMS, READ_ME = "pack.json", "SHA256SUMS", "README"
RAW = (".json", ".jsonl", ".md")
"""Endings of the records that a pack holds; of a checkpoint its weights are only named by their hash."""
DRAWING = ("matplotlib", "jinja2", "vllm-pareto")
"""Packages that draw the page: of other versions they may draw it otherwise."""
TOLERANCE = 1e-6
"""Relative difference up to which a figure is the same: libraries of other versions round otherwise."""


def pack(graph: Graph, folder: Folder, page: Path, plan_file: Path) -> Path:
    """Write the pack of a study that was concluded; returns its path.

    Args:
        graph: its steps.
        folder: of their results.
        page: as :func:`bench.study.outcome.conclude` wrote it.
        plan_file: the plan, beside which recipes and shapes in files lie.

    """
    place = page.parent
    words = ["pareto", "study", PLAN, "--data", "DIR", "--models", "DIR", "--pack"]
    files = {name: (place / name).read_bytes() for name in (PLAN, STUDY, PAGE)}
    recipes = {str(point.weights.settings.get("recipe", "")) for point in graph.points if point.weights}
    shapes = {str(point.weights.setting("student_config") or "") for point in graph.points if point.weights}
    beside = {name: plan_file.parent / name for name in recipes | shapes if name}
    files |= {name: file.read_bytes() for name, file in beside.items() if file.is_file()}
    hashes: dict[str, str] = {}
    for key in graph.steps:
        for path in sorted(p for p in folder.of(key).rglob("*") if p.is_file()):
            name = f"steps/{key}/{path.relative_to(folder.of(key)).as_posix()}"
            inner = path.relative_to(folder.of(key))
            if path.name in ("lock", "users") or any(part.startswith(".") for part in inner.parts):
                continue
            if path.suffix in RAW and path.name not in ("tokenizer.json",):
                files[name] = path.read_bytes()
            elif inner.parts[0] == "out":
                with path.open("rb") as opened:
                    hashes[name] = hashlib.file_digest(opened, "sha256").hexdigest()
            elif path.name == LOG:
                files[name] = path.read_bytes()
    manifest = {
        "schema": SCHEMA,
        "study": graph.plan.study,
        "seeds": read_json(place / STUDY)["seeds"],
        "command": words,
        "versions": versions(),
        "drawn_with": _drawing(),
        "cells": [cell.__dict__ for cell in graph.cells],
        "steps": list(graph.steps),
        "states": {step["key"]: [step["status"], step["reason"]] for step in read_json(place / STUDY)["steps"]},
        "not_packed_sha256": hashes,
    }
    files[MANIFEST] = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True).encode()
    files[READ_ME] = _read_me(graph.plan.study, words).encode()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    files[SUMS] = sums.encode()
    path = place / f"{graph.plan.study}.tar"
    with replacing(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(files.items()):
            # Of a file nothing but its name and content goes in, so that the same records give the same bytes.
            entry = tarfile.TarInfo(f"{graph.plan.study}/{name}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    return path


def _drawing() -> dict[str, str]:
    import importlib.metadata

    found = {name: importlib.metadata.version(name) for name in DRAWING}
    return found | {"commit": str(commit())}


def _read_me(study: str, words: list[str]) -> str:
    return (
        f"Everything that the study {study} was judged by.\n\n"
        "Check it, its verdicts and its page on any machine:  pareto study --verify THIS.tar\n"
        f"Repeat it where the plan's models and data lie:     {' '.join(words)}\n\n"
        f"{SUMS} has a hash of every file here (sha256sum -c {SUMS}); {MANIFEST} says the versions, and the hashes of\n"
        "checkpoints, which are not here. The machines are in study.json and in each steps/KEY/done.json.\n"
    )


def verify(path: Path) -> int:
    """Check a pack, say what was found, and return the exit status: 0 if it holds, else 1.

    Raises:
        ParetoError: it is no pack.

    """
    with tempfile.TemporaryDirectory(prefix="pareto-pack-") as work:
        root = _unpacked(path, Path(work))
        wrong = _wrong_hashes(root)
        for line in wrong:
            print(f"wrong: {line}")
        if wrong:
            return 1
        count = len((root / SUMS).read_text().splitlines())
        print(f"{path}: {count} files have the hashes that the pack states")
        manifest = read_json(root / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            raise ParetoError(f"{path}: {MANIFEST} is not of {SCHEMA}")
        return _again(root, manifest, Path(work) / "again")


def _unpacked(path: Path, work: Path) -> Path:
    """Unpack into a folder; returns the pack's own."""
    try:
        with tarfile.open(path) as tar:
            # By hand: the filter of `extractall` that keeps members inside came with Python 3.11.4.
            for member in tar:
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts or not (member.isfile() or member.isdir()):
                    raise ParetoError(f"{path}: not a pack of pareto study ({member.name} is no file inside of it)")
                if member.isfile() and (content := tar.extractfile(member)) is not None:
                    (work / place).parent.mkdir(parents=True, exist_ok=True)
                    (work / place).write_bytes(content.read())
    except (OSError, tarfile.TarError) as error:
        raise ParetoError(f"{path}: not a pack of pareto study ({error})") from error
    roots = [one for one in work.iterdir() if (one / SUMS).is_file()]
    if len(roots) != 1:
        raise ParetoError(f"{path}: not a pack of pareto study (no {SUMS} in it)")
    return roots[0]


def _wrong_hashes(root: Path) -> list[str]:
    """Return what differs from the stated hashes: files that changed, are missing, or were added."""
    stated = dict(line.split("  ", 1)[::-1] for line in (root / SUMS).read_text().splitlines())
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} - {SUMS}
    wrong = [f"{name} is missing" for name in sorted(set(stated) - present)]
    wrong += [f"{name} is not of the pack" for name in sorted(present - set(stated))]
    for name in sorted(present & set(stated)):
        if hashlib.sha256((root / name).read_bytes()).hexdigest() != stated[name]:
            wrong.append(f"{name} was changed")
    return wrong


def restored(root: Path, manifest: dict[str, Any]) -> tuple[Graph, Progress, Folder]:
    """Return a packed study, without the models and data that it was made from."""
    folder = Folder(root)
    plan = load_plan(root / PLAN)
    steps = {key: _step(folder, key) for key in manifest["steps"]}
    cells = [Cell(**cell | {"tasks": tuple(cell["tasks"])}) for cell in manifest["cells"]]
    points: list[Point] = make_points(plan, root)
    graph = Graph(plan, points, steps, cells)
    states = {}
    for key, (status, reason) in manifest["states"].items():
        outcome = folder.recorded(key)
        state = BEFORE if status == "done" else status if status in (FAILED, SKIPPED) else SKIPPED
        states[key] = State(state, reason, seconds=outcome.seconds if outcome else 0.0)
    return graph, Progress(graph, folder, states), folder


def _step(folder: Folder, key: str) -> Step:
    """Return a packed step; one that was never begun left no record, and its name is all that is shown of it."""
    if (folder.of(key) / RECORD).is_file():
        return folder.read(key)
    return Step(key, key.partition("-")[0], key, ())  # type: ignore[arg-type]


def _again(root: Path, manifest: dict[str, Any], again: Path) -> int:
    """Judge a packed study anew and compare."""
    graph, progress, folder = restored(root, manifest)
    names = {step["key"]: step["name"] for step in read_json(root / STUDY)["steps"]}
    graph.steps = {key: _named(step, names) for key, step in graph.steps.items()}
    page = conclude(graph, folder, root / PLAN, progress, place=again)
    stated, found = read_json(root / STUDY), read_json(page.parent / STUDY)
    different = list(differences(stated, found))
    for line in different[:20]:
        print(f"wrong: study.json: {line}")
    if different:
        print(f"the records do not give what study.json says, in {len(different)} places")
        return 1
    print(f"the records give the same figures and verdicts: {_verdicts(found)}")
    if page.read_bytes() == (root / PAGE).read_bytes():
        print("and the same page")
        return 0
    here, there = _drawing(), manifest["drawn_with"]
    if here != there:
        print(f"the page is drawn otherwise here: it was made with {there}, and this machine has {here}")
        return 0
    print("wrong: the records do not give the page that is in the pack")
    return 1


def _named(step: Step, names: dict[str, str]) -> Step:
    # Two plans of one folder may call a step differently; its record has the name that the later one gave it.
    return Step(**step.__dict__ | {"name": names.get(step.key, step.name)})


def differences(stated: Any, found: Any, where: str = "") -> list[str]:
    """Return where two documents differ, by more than rounding."""
    if isinstance(stated, dict) and isinstance(found, dict):
        keys = dict.fromkeys((*stated, *found))
        return [
            line for key in keys for line in differences(stated.get(key), found.get(key), f"{where}.{key}".lstrip("."))
        ]
    if isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        return [
            line
            for i, pair in enumerate(zip(stated, found, strict=True))
            for line in differences(*pair, f"{where}[{i}]")
        ]
    if (
        isinstance(stated, float)
        and isinstance(found, float)
        and math.isclose(stated, found, rel_tol=TOLERANCE, abs_tol=1e-12)
    ):
        return []
    return [] if stated == found else [f"{where} is {str(stated)[:80]}, and the records give {str(found)[:80]}"]


def _verdicts(study: dict[str, Any]) -> str:
    hypotheses = [f"{one['name']} {one['verdict']}" for one in study["hypotheses"]]
    improving = sum(one["improves"] for one in study["improvements"])
    return "; ".join([*hypotheses, f"{improving} of {len(study['improvements'])} points improve on their baseline"])
