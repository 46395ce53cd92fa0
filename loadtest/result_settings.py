"""Flags of ``pareto loadtest`` about results: read, compared, repeated, judged and shown."""

from __future__ import annotations

import argparse


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("runs that are there already")
    group.add_argument("--summarize", metavar="DIR", help="print the table of a run from its records, killed runs too")
    group.add_argument("--resume", metavar="DIR", help="go on with an interrupted run: stages that ended are kept")
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare two runs, or two folders of repeated runs: change from A to B of each figure, with its interval",
    )
    group = parser.add_argument_group("judgement")
    group.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit status 1 if it holds: 'p95_ttft > 500' (ms) of a run, 'p95_ttft > +5%%' of a comparison, shown at "
        "the 5%% level; may be given again",
    )
    group.add_argument(
        "--steady", action="store_true", help="judge and compare the steady part of each stage: no ramp, no drain"
    )
    group = parser.add_argument_group("repeats")
    group.add_argument(
        "--repeat", metavar="N[..MAX]", help="run everything N times; up to MAX with --until-ci (default: once)"
    )
    group.add_argument(
        "--until-ci",
        metavar="P%",
        help="stop repeating once the interval of every stage's P95 of TTFT and end to end is within P%% of its value",
    )
    group = parser.add_argument_group("reports")
    group.add_argument("--report", metavar="FILE.html", help="write a page of the run or of the comparison")
    group.add_argument("--csv", metavar="FILE", help="write every figure, one a line")
    group.add_argument("--junit", metavar="FILE", help="write the conditions of --fail-if as JUnit XML, for CI")
