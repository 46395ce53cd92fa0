"""What ``pareto loadtest`` does with results: reads, compares, judges and shows them; with the exit status of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest.comparison.compare import FAILED, Verdict, compare, judge_run
from loadtest.comparison.conditions import parse_condition
from loadtest.comparison.side import Side, read_side
from loadtest.comparison.tables import print_comparison, print_verdicts
from loadtest.errors import LoadTestError
from loadtest.report.files import check_files, write_files
from loadtest.request_settings import require
from loadtest.results.console import print_summary
from loadtest.results.manifest import PARETO
from loadtest.results.offline import open_folder, stored_summary, summarize_folder
from loadtest.results.output import SUMMARY
from loadtest.results.records import write_json_atomically

MODES = ("summarize", "resume", "compare")


def check_result_flags(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself, before anything is run.

    Raises:
        LoadTestError: with what is wrong.

    """
    given = [f"--{mode}" for mode in MODES if getattr(args, mode)] + (["--repeat"] if args.repeat else [])
    require(len(given) < 2, f"{' and '.join(given)} exclude each other")
    conditions = [parse_condition(text) for text in args.fail_if]
    for condition in conditions:
        require(
            bool(args.compare) or not condition.relative,
            f"--fail-if {condition.text!r} is about a change: it needs --compare A B",
        )
        if condition.figure.name.startswith("goodput") and not (args.compare or args.summarize or args.resume):
            require(bool(args.goodput), f"--fail-if {condition.text!r} needs --goodput")
    require(not (args.until_ci and not args.repeat), "--until-ci needs --repeat N..MAX")
    require(not (args.junit and not args.fail_if), "--junit writes what became of --fail-if: give at least one")
    check_files(args)


def read_only(args: argparse.Namespace) -> int | None:
    """Do what ``--summarize`` or ``--compare`` asks for; returns the exit status, or None where neither was given."""
    if args.summarize:
        return _summarize(Path(args.summarize), args)
    if args.compare:
        return _compare(args)
    return None


def judge(side: Side, args: argparse.Namespace) -> int:
    """Judge a run that is there by ``--fail-if``, and write its reports; returns the exit status."""
    verdicts = judge_run(side, [parse_condition(text) for text in args.fail_if], args.steady)
    write_files(args, side=side, verdicts=verdicts)
    return _tell(verdicts)


def wants_judgement(args: argparse.Namespace) -> bool:
    """Whether a run is to be read again after it has ended."""
    return bool(args.fail_if or args.report or args.csv or args.junit)


def _summarize(path: Path, args: argparse.Namespace) -> int:
    folder = open_folder(path, "--summarize")
    summary = summarize_folder(folder)
    print_summary(summary)
    missing = stored_summary(path) is None
    if missing:
        try:
            write_json_atomically(path / SUMMARY, summary.to_dict())
        except OSError as error:
            raise LoadTestError(f"--summarize {path}: {SUMMARY}: {error.strerror or error}") from error
    print(f"results: {path / SUMMARY}{'' if missing else ' (was there, and is left as it is)'}")
    if summary.status == "interrupted":
        resumable = folder.manifest is None or folder.manifest.driver == PARETO
        further = "--resume goes on with it" if resumable else "start it again with Locust"
        print(f"pareto loadtest: note: the run did not end; {further}", file=sys.stderr)
    return judge(read_side(path, "--summarize"), args) if wants_judgement(args) else 0


def _compare(args: argparse.Namespace) -> int:
    a, b = (read_side(Path(each), "--compare") for each in args.compare)
    comparison = compare(a, b, [parse_condition(text) for text in args.fail_if], args.steady)
    print_comparison(comparison)
    write_files(args, comparison=comparison, verdicts=comparison.verdicts)
    return _tell(comparison.verdicts)


def _tell(verdicts: Sequence[Verdict]) -> int:
    print_verdicts(verdicts)
    failed = [verdict for verdict in verdicts if verdict.outcome == FAILED]
    for verdict in failed:
        print(f"pareto loadtest: failed: {verdict.load}: {verdict.condition.text}: {verdict.message}", file=sys.stderr)
    return 1 if failed else 0
