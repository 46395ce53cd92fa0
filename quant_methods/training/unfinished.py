"""A training's work folder: whose it is, whether there is something to go on from, and the result's way out of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import write_json
from quant_methods.work_folder import LOCK, locked

JOB = "job.json"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoint-*"


def check_new(out: Path) -> None:
    """Refuse a place where something lies.

    Raises:
        ParetoError: it does.

    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ParetoError(f"{out} exists; give another --out, or delete it")


@contextlib.contextmanager
def alone(work: Path, worth: Collection[str] = (CHECKPOINTS,)) -> Iterator[None]:
    """Keep other runs out of a work folder, and delete it where a run fails that leaves nothing to go on from.

    Args:
        work: the folder.
        worth: patterns of what is worth to be kept.

    Raises:
        ParetoError: another run is in it.

    """
    with locked(work):
        try:
            yield
        except BaseException:
            # A folder without a description is not one that we wrote.
            if (work / JOB).is_file() and not any(any(work.glob(pattern)) for pattern in worth):
                shutil.rmtree(work)
            raise


def same_job(work: Path, described: dict[str, Any], *, drop: Collection[str] = ()) -> None:
    """Refuse to go on with what another job left; note what this one is. Without a checkpoint nothing is lost.

    Args:
        work: the folder.
        described: what determines the result, as JSON values, with ``settings`` among them.
        drop: names of folders that another job made before its first step, and this one makes anew.

    Raises:
        ParetoError: another job has begun there, or what lies there is none of ours.

    """
    path, about = work / JOB, json.loads(json.dumps(described))
    found = json.loads(path.read_text()) if path.is_file() else None
    if found == about:
        return
    if found is None:
        if strange := sorted(path.name for path in work.iterdir() if path.name not in (LOCK, LOG)):
            raise ParetoError(f"{work} holds {strange[0]}, which pareto did not write; give another --out")
    elif any(work.glob(CHECKPOINTS)) and (what := _difference(found, about)):
        raise ParetoError(
            f"{work} is an unfinished run with {what}; give the same as then, another --out, or delete that folder"
        )
    for name in drop:
        shutil.rmtree(work / name, ignore_errors=True)
    write_json(path, about)


def _difference(found: dict[str, Any], about: dict[str, Any]) -> str | None:
    """Return the first thing that differs, in words."""
    were = found.get("settings", {})
    for name, value in about["settings"].items():
        if were.get(name) != value:
            return f"another {name.replace('_', ' ')} ({were.get(name)}, not {value})"
    for name, value in about.items():
        if found.get(name) != value:
            if name == "data":
                return "other data"
            return f"another --{name.replace('_', '-')}" if "_" in name else f"another {name}"
    return None


def finish(made: Path, out: Path, work: Path, result: str, about: dict[str, Any]) -> None:
    """Write what a result says of itself, and let it appear in one piece.

    Args:
        made: the result's folder, in the work folder.
        out: where it goes; an empty folder there is replaced.
        work: the folder, which goes.
        result: name of the file that says how it came about.
        about: which that says.

    """
    shutil.copyfile(work / LOG, made / "training_log.jsonl")
    write_json(made / result, about)
    if out.exists():
        out.rmdir()
    made.rename(out)
    shutil.rmtree(work)


def versions(*others: str) -> dict[str, str]:
    """Return the versions of the libraries that a result depends on.

    Args:
        others: besides those that every training uses.

    """
    import importlib.metadata

    names = ("torch", "transformers", *others, "accelerate", "vllm-pareto")
    return {name: importlib.metadata.version(name) for name in names}
