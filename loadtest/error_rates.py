"""How often ``--compare`` is wrong: false alarms between equal servers, and planted regressions that it misses.

    python -m loadtest.error_rates --pairs 200 --out results/loadtest-compare/error-rates.json

Real load tests against mock servers that queue: each pair is two runs against one server (A/A) and a third one against
a server that is slower by ``--planted``. What a test of 5% should say is known for both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from loadtest.mock_server.process import mock_process
from loadtest.results.output import RECORDS, environment_info
from loadtest.results.records import read_records, write_json_atomically
from loadtest.statistics.changes import Difference
from loadtest.statistics.figures import parse_figure
from loadtest.statistics.samples import SampleCollector, Samples

FIGURES = ("p50_ttft", "p95_ttft", "mean_ttft", "p95_e2e", "mean_e2e")
LIMITS = (0.0, 0.05)
ALPHA = 0.05
TTFT_MS, ITL_MS, CAPACITY = 200.0, 20.0, 8


@dataclass(frozen=True)
class Plan:
    """The load of every run, and how much slower the third server of a pair is."""

    rate: float
    requests: int
    planted: float


Triple = tuple[Samples, Samples, Samples]


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.error_rates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--requests", type=int, default=320, help="of each run (default: 320)")
    parser.add_argument("--rate", type=float, default=16.0, help="requests per second (default: 16)")
    parser.add_argument("--planted", type=float, default=0.1, help="by how much the third server is slower (0.1)")
    parser.add_argument("--processes", type=int, default=2, help="pairs at once (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of a side where runs are the unit (default: 5)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.pairs, args.requests, args.processes, args.repeats) < 1 or not args.out.parent.is_dir():
        parser.error("numbers must be at least 1, and the folder of --out must exist")
    plan = Plan(args.rate, args.requests, args.planted)
    context, found = multiprocessing.get_context("spawn"), list[Triple]()
    with ExitStack() as cleanup:
        servers = context.SimpleQueue()
        for _ in range(args.processes):
            factors = (1.0, 1 + plan.planted)
            delays = [("--ttft-ms", TTFT_MS * each, "--itl-ms", ITL_MS * each) for each in factors]
            mocks = [cleanup.enter_context(mock_process(*each, "--capacity", CAPACITY)) for each in delays]
            servers.put([mock.url for mock in mocks])
        pool = cleanup.enter_context(context.Pool(args.processes, _begin, (servers, plan)))
        for triple in pool.imap_unordered(_pair, range(args.pairs)):
            found.append(triple)
            if len(found) % 10 == 0 or len(found) == args.pairs:
                # What is known so far is kept, as this takes long.
                write_json_atomically(args.out, _document(plan, found, args.repeats))
                print(f"{len(found)} of {args.pairs} pairs", file=sys.stderr, flush=True)
    return 0


def _document(plan: Plan, triples: list[Triple], repeats: int) -> dict[str, Any]:
    return {
        "schema": "vllm-pareto/loadtest-error-rates/1",
        "mock": {"ttft_ms": TTFT_MS, "itl_ms": ITL_MS, "capacity": CAPACITY, "output_tokens": "uniform:1:13"},
        "rate": plan.rate,
        "requests": plan.requests,
        "planted": plan.planted,
        "pairs": len(triples),
        "environment": environment_info(),
        "single_runs": _rates([([a], [b], [c]) for a, b, c in triples]),
        "repeats": repeats,
        "repeated_runs": _rates(_grouped(triples, repeats)),
    }


_mine: tuple[list[str], Plan]


def _begin(servers: Any, plan: Plan) -> None:
    """Take two servers, which are this process's own from now on: runs at the same time must not meet in a queue."""
    global _mine  # noqa: PLW0603
    _mine = servers.get(), plan


def _pair(_: int) -> Triple:
    """Run A and B on the equal server and C on the slower one."""
    (base, slow), plan = _mine
    return _run(base, plan), _run(base, plan), _run(slow, plan)


def _run(url: str, plan: Plan) -> Samples:
    """Run one load test as the command does, and read its records back."""
    from loadtest.unpatched import import_locust

    import_locust()
    from loadtest import command
    from loadtest.load.runner import run_load_test
    from loadtest.settings import load_settings

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with tempfile.TemporaryDirectory() as folder:
        words = f"--base-url {url} --rate {plan.rate} --requests {plan.requests}  --warmup 8 --no-progress"
        words += f" --no-server-metrics --prompt-tokens 8 --output-tokens uniform:1:13 --out {folder}/out"
        run_load_test(load_settings(parser.parse_args(words.split())))
        collector = SampleCollector({})
        for record in read_records(Path(folder) / "out" / RECORDS):
            collector.add(record)
        return collector.samples()


Sides = tuple[list[Samples], list[Samples], list[Samples]]


def _grouped(triples: list[Triple], size: int) -> list[Sides]:
    """Return groups of ``size`` runs a side, the rest left out."""
    groups = []
    for begin in range(0, len(triples) - size + 1, size):
        a, b, c = zip(*triples[begin : begin + size], strict=True)
        groups.append((list(a), list(b), list(c)))
    return groups


def _rates(comparisons: list[Sides]) -> dict[str, Any]:
    """Return by figure and limit how often a rise was called shown: in A/A, and where one was planted."""
    found: dict[str, Any] = {}
    for name in FIGURES:
        figure = parse_figure(name)
        for limit in LIMITS:
            alarms = sum(Difference(a, b, figure).p_above(limit) < ALPHA for a, b, _ in comparisons)
            hits = sum(Difference(a, c, figure).p_above(limit) < ALPHA for a, _, c in comparisons)
            points = [Difference(a, c, figure).change().change for a, _, c in comparisons]
            changes = [point for point in points if point is not None]
            found[f"{name} > +{100 * limit:g}%"] = {
                "comparisons": len(comparisons),
                "false_alarms": _share(alarms, len(comparisons)),
                "found": _share(hits, len(comparisons)),
                "median_change": round(sorted(changes)[len(changes) // 2], 4) if changes else None,
            }
    return found


def _share(hits: int, of: int) -> dict[str, Any] | None:
    """Return a share with its 95% interval (Clopper and Pearson 1934)."""
    if not of:
        return None
    low, high = stats.binomtest(hits, of).proportion_ci()
    return {"count": hits, "share": round(hits / of, 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    sys.exit(main())
