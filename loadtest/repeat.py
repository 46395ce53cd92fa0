"""``--repeat``: the whole run several times, until its figures are known well enough."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest.comparison.repeats import RepeatedStage, print_repeats, repeated_stages, to_document, widest
from loadtest.comparison.side import RUN_FOLDERS, Run, Side, read_run
from loadtest.errors import LoadTestError
from loadtest.request_settings import require
from loadtest.results.offline import open_folder
from loadtest.results.output import RECORDS
from loadtest.results.records import write_json_atomically
from loadtest.settings import Settings

REPEATS = "repeats.json"
_LEAST_TO_STOP = 3
_DEFAULT_MOST = 10


def parse_repeat(text: str, until_ci: str | None) -> tuple[int, int, float | None]:
    """Return the least and the greatest number of runs, and the relative half-width to stop at.

    Raises:
        LoadTestError: the flags say none.

    """
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if not found:
        raise LoadTestError(f"--repeat {text}: expected a number of runs, or a range such as 3..10")
    least = int(found[1])
    width = re.fullmatch(r"(\d+(?:\.\d+)?)%", until_ci or "1%")
    if not width or not 0 < float(width[1]) < 100:
        raise LoadTestError(f"--until-ci {until_ci}: expected a percentage above 0 and below 100, such as 5%")
    most = int(found[2]) if found[2] else max(least, _DEFAULT_MOST) if until_ci else least
    require(1 <= least <= most, f"--repeat {text}: the first number must be at least 1 and at most the second")
    require(not (found[2] and not until_ci), f"--repeat {text}: a range needs --until-ci, which says when to stop")
    require(
        not (until_ci and most < _LEAST_TO_STOP), f"--until-ci: {_LEAST_TO_STOP} runs or more have an interval of use"
    )
    return max(least, _LEAST_TO_STOP) if until_ci else least, most, float(width[1]) / 100 if until_ci else None


def run_repeats(settings: Settings, args: argparse.Namespace, run_once: Callable[[Settings], int]) -> int:
    """Run ``settings`` into ``OUT/run-01`` and so on, and write ``OUT/repeats.json``; returns the worst exit status.

    Each run has a seed of its own, the next number, so that no prompt of one run is known from another.

    Raises:
        LoadTestError: the flags are no good, or there are runs already and ``--overwrite`` is not given.

    """
    least, most, width = parse_repeat(args.repeat, args.until_ci)
    out = settings.out
    there = sorted(each.parent for each in out.glob(f"{RUN_FOLDERS}/{RECORDS}"))
    require(settings.overwrite or not there, f"--out {out}: {there[0].name if there else ''} exists; give another "
            "directory or --overwrite")  # fmt: skip
    require(not (out / RECORDS).exists(), f"--out {out}: holds a single run; give another directory for --repeat")
    status, runs, stages = 0, list[Run](), list[RepeatedStage]()
    for number in range(1, most + 1):
        print(f"run {number} of {f'{least} to {most}' if least < most else most}", flush=True)
        request = replace(settings.request, seed=settings.request.seed + number - 1)
        one = replace(
            settings, out=out / f"run-{number:02}", request=request, flags={**settings.flags, "seed": request.seed}
        )
        now = run_once(one)
        status = max(status, now)
        if now:
            # A run that failed or was interrupted is like no other, and further ones would only hide that.
            print(f"run {number} ended with status {now}: no further run is made")
            break
        runs.append(read_run(open_folder(one.out, "--repeat")))
        stages = repeated_stages(Side(out, tuple(runs)))
        _write(out, settings, runs, stages, width)
        if width is not None and number >= least and widest(stages) <= width:
            break
    if settings.overwrite:
        _forget(there, len(runs))
    if len(runs) > 1:
        print_repeats(stages, width)
    return status


def _write(
    out: Path, settings: Settings, runs: Sequence[Run], stages: Sequence[RepeatedStage], width: float | None
) -> None:
    document: dict[str, Any] = to_document(runs, stages)
    document["until_ci"] = width
    document["settings"] = settings.flags
    write_json_atomically(out / REPEATS, document)


def _forget(there: Sequence[Path], count: int) -> None:
    """Rename the folders of an earlier, longer series, which must not be taken for repeats of this one."""
    for folder in there:
        if int(folder.name.rpartition("-")[2]) > count:
            folder.rename(folder.with_name(f"old-{folder.name}"))
