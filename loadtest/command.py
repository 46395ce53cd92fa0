"""``pareto loadtest``: load-test an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from loadtest.results.manifest import Manifest
    from loadtest.settings import Settings

HELP = "load-test an OpenAI-compatible endpoint; exact percentiles, throughput, goodput"
DESCRIPTION = """\
Load-test any OpenAI-compatible endpoint and report exact P50/P90/P95/P99 of time to first token (TTFT), time per
output token (TPOT), inter-token latency (ITL) and end-to-end latency, throughput, goodput, and failures by class.

Closed loop: N users, each sending its next request when the last one has ended.
  pareto loadtest --concurrency 8 --requests 200 --warmup 8 --prompt-tokens 512 --output-tokens 128

Open loop: requests arrive at a rate whatever the server does, and latency counts from the intended start, so that a
stalled server cannot hide behind requests that were never sent.
  pareto loadtest --rate 4 --arrival poisson --duration 60 --goodput ttft:500 tpot:50

Sweep: several values are several stages, with one row each in the table.
  pareto loadtest --concurrency 1 4 16 64 --requests 200 --label int4_per_head --out results/int4
  pareto loadtest --rate 1 2 4 8 --duration 30 --prompt-tokens lognormal:512:0.8:16:4096 --output-tokens uniform:32:256

More than one core can send: several processes share the load, and it stays what it is with one.
  pareto loadtest --rate 500 --duration 60 --processes 2

Proof: repeat, compare, and fail on what is shown to be slower (docs/loadtest-comparing.md).
  pareto loadtest --rate 4 --requests 500 --repeat 5 --out after
  pareto loadtest --compare before after --fail-if 'p95_ttft > +5%' --report change.html --junit change.xml

Results in --out: run.json (settings, stages that ended), records.jsonl (one line a request), summary.json,
server_metrics.jsonl (the server's own metrics). Ctrl-C stops the run and reports what was measured, marked as
interrupted. Exit status: 0; 1 when more than 5% of a stage's requests failed (--max-error-rate sets another limit) or
a --fail-if holds; 2 for bad input; 130 after Ctrl-C. Go on with --resume; --summarize reads what a killed run left. No
server at hand: python -m loadtest.mock_server. With Locust's web UI and workers: locust -f loadtest/locustfile.py.
"""
USER_ERRORS = (LoadTestError,)
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    # Locust is imported by no flag, so that --help is quick.
    from loadtest.request_settings import add_request_arguments
    from loadtest.result_settings import add_result_arguments
    from loadtest.settings import add_load_arguments

    add_load_arguments(parser)
    add_request_arguments(parser)
    add_result_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the flags ask for and print its table; returns the exit status."""
    from loadtest.outcome import check_result_flags, judge, read_only, wants_judgement
    from loadtest.settings import load_settings

    check_result_flags(args)
    status = read_only(args)
    if status is not None:
        return status
    resumed = None
    if args.resume:
        from loadtest.load.resume import resume_settings

        settings, resumed = resume_settings(args, _defaults())
    else:
        settings = load_settings(args)
    if args.repeat:
        from loadtest.comparison.side import read_side
        from loadtest.repeat import run_repeats

        status = run_repeats(settings, args, _run_once)
        return status or (judge(read_side(settings.out, "--repeat"), args) if wants_judgement(args) else 0)
    status = _run_once(settings, resumed)
    if status != INTERRUPTED and wants_judgement(args):
        from loadtest.comparison.side import read_side

        status = max(status, judge(read_side(settings.out, "--out"), args))
    return status


def _defaults() -> dict[str, Any]:
    """Return the value of every flag that is not given."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args([]))


def _run_once(settings: Settings, resumed: Manifest | None = None) -> int:
    """Run the load test, print its table and what is wrong with it; returns the exit status."""
    from loadtest.unpatched import import_locust

    import_locust()
    from loadtest.load.error_limit import exceeded
    from loadtest.load.runner import run_load_test
    from loadtest.results.console import load_name, print_summary
    from loadtest.results.output import SUMMARY
    from loadtest.stage_spec import DEFAULT_MAX_ERROR_RATE

    summary = run_load_test(settings, resumed)
    print_summary(summary)
    print(f"results: {settings.out / SUMMARY}")
    print(f"seed: {settings.request.seed} (--seed {settings.request.seed} sends the same requests again)")
    if summary.status == "interrupted":
        print("pareto loadtest: interrupted; the results above are partial", file=sys.stderr)
        return INTERRUPTED
    if summary.error is not None:
        # A search is not resumed, for what it asks next depends on how its stages went.
        further = "" if summary.search else " (--resume goes on with the run)"
        print(f"pareto loadtest: error: {summary.error}; the results above are partial{further}", file=sys.stderr)
        return 1
    if not any(stage.requests.ok for stage in summary.stages):
        print("pareto loadtest: error: no request succeeded", file=sys.stderr)
        return 1
    limit = DEFAULT_MAX_ERROR_RATE if settings.max_error_rate is None else settings.max_error_rate
    failing = [stage for stage in summary.stages if exceeded(limit, stage)]
    for stage in failing:
        failed, ended = stage.requests.failed, stage.requests.ok + stage.requests.failed
        stopped = ", and the run was stopped" if not stage.finished else ""
        print(
            f"pareto loadtest: error: {load_name(stage)}: {failed} of {ended} requests failed ({failed / ended:.1%}), "
            f"more than --max-error-rate {limit:g} allows{stopped}",
            file=sys.stderr,
        )
    if failing:
        return 1
    return 0
