"""``--resume``: go on with a run that was interrupted or killed, from its ``run.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.request_settings import require
from loadtest.results.manifest import LOCUST, Manifest
from loadtest.results.offline import Folder, open_folder
from loadtest.results.output import RECORDS, RUN, SERVER_METRICS, SUMMARY
from loadtest.results.records import write_text_atomically
from loadtest.settings import Settings, load_settings

# What does not change the load, or is not kept in run.json because it is secret.
MAY_BE_GIVEN = frozenset(
    {"resume", "api_key", "header", "processes", "progress", "exporter_port", "exporter_host", "exporter_linger"}
    | {"fail_if", "steady", "report", "csv", "junit"}
)  # fmt: skip
DROPPED = "records.dropped.jsonl"
_NOT_FLAGS = ("config", "rest")


def resume_settings(args: argparse.Namespace, defaults: dict[str, Any]) -> tuple[Settings, Manifest]:
    """Return the settings of the run that ``args.resume`` names, and how far it came.

    Args:
        args: the flags of the command that goes on with it.
        defaults: value of every flag that is not given.

    Raises:
        LoadTestError: the folder is none of an unfinished run, or flags are given that would change its load.

    """
    folder = open_folder(Path(args.resume), "--resume")
    manifest = folder.manifest
    if manifest is None:
        raise LoadTestError(
            f"--resume {folder.path}: no {RUN} in it, which says what was to be run; --summarize reads it"
        )
    require(
        manifest.driver != LOCUST,
        f"--resume {folder.path}: a test of Locust's, which alone begins and ends its users; start it again, and read "
        "this one with --summarize",
    )
    require(not manifest.complete, f"--resume {folder.path}: all of its {manifest.planned} stages have ended")
    given = {name: value for name, value in vars(args).items() if name not in _NOT_FLAGS}
    extra = sorted(name for name, value in given.items() if name not in MAY_BE_GIVEN and value != defaults.get(name))
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in extra)
    require(not extra, f"--resume takes the settings from {folder.path / RUN}; leave out {flags}")
    wanted = manifest.settings.get("header") or []
    names = [line.partition(":")[0] for line in args.header]
    missing = ", ".join(name for name in wanted if name not in names)
    require(not missing, f"--resume: values of headers are not stored; give --header again for {missing}")
    changed = {name: given[name] for name in MAY_BE_GIVEN if given.get(name) != defaults.get(name)}
    known = {name: value for name, value in manifest.settings.items() if name in defaults}
    flags_then = {**defaults, **known, "header": args.header, **changed, "out": str(folder.path), "overwrite": False}
    settings = load_settings(argparse.Namespace(**flags_then))
    # What a search asks next depends on how its stages went, which the records alone do not say.
    require(settings.search is None, f"--resume {folder.path}: a search (--find) is not resumed; start it again")
    return settings, manifest


def drop_unfinished(folder: Folder) -> int:
    """Take what an unfinished stage left out of the records; returns how many lines were moved away.

    They are appended to ``records.dropped.jsonl`` before ``records.jsonl`` is replaced, so none is ever lost. Without
    ``run.json`` nothing is done.
    """
    if folder.manifest is None:
        return 0
    kept, dropped = _split(folder.path / RECORDS, frozenset(folder.manifest.finished))
    if dropped:
        with (folder.path / DROPPED).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in dropped)
    write_text_atomically(folder.path / RECORDS, "".join(f"{line}\n" for line in kept))
    samples = folder.path / SERVER_METRICS
    if samples.exists():
        kept, _ = _split(samples, frozenset([-1, *folder.manifest.finished]))
        write_text_atomically(samples, "".join(f"{line}\n" for line in kept))
    # An old summary must never be taken for that of the run which goes on.
    (folder.path / SUMMARY).unlink(missing_ok=True)
    return len(dropped)


def _split(path: Path, stages: frozenset[int]) -> tuple[list[str], list[str]]:
    """Return the lines of ``stages``, and the others; a line that is no JSON is another."""
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
            stage = content.get("stage") if isinstance(content, dict) else None
        except ValueError:
            stage = None
        (kept if stage in stages else dropped).append(line)
    return kept, dropped
