"""``--report``, ``--csv`` and ``--junit``: where they go, and that they can be written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from loadtest.comparison.compare import Comparison, Verdict
from loadtest.comparison.side import Side
from loadtest.errors import LoadTestError
from loadtest.report.junit import junit_xml
from loadtest.report.table import csv_text
from loadtest.results.records import write_text_atomically

FLAGS = ("report", "csv", "junit")


def check_files(args: argparse.Namespace) -> None:
    """Refuse files that could not be written after an hour's run.

    Raises:
        LoadTestError: a folder is missing, or a name is that of a folder.

    """
    for flag in FLAGS:
        name = getattr(args, flag)
        if name and (Path(name).is_dir() or not Path(name).parent.is_dir()):
            why = "is a folder" if Path(name).is_dir() else f"there is no folder {Path(name).parent}"
            raise LoadTestError(f"--{flag} {name}: {why}; give the name of a file")


def write_files(
    args: argparse.Namespace,
    *,
    verdicts: Sequence[Verdict],
    side: Side | None = None,
    comparison: Comparison | None = None,
) -> None:
    """Write what was asked for, of a run or of a comparison.

    Raises:
        LoadTestError: a file cannot be written.

    """
    from loadtest.report.page import render

    texts = {
        "report": lambda: render(side, comparison, verdicts),
        "csv": lambda: csv_text(side, comparison),
        "junit": lambda: junit_xml(verdicts),
    }
    for flag in FLAGS:
        name = getattr(args, flag)
        if not name:
            continue
        try:
            write_text_atomically(Path(name), texts[flag]())
        except OSError as error:
            raise LoadTestError(f"--{flag} {name}: {error.strerror or error}") from error
        print(f"{flag}: {name}")
