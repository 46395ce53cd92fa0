"""How exact the load test is: its times beside the mock server's own log of when each token left.

    python -m loadtest.accuracy --out results/loadtest-accuracy/quiet.json

One run at ``--rate`` requests a second over ``--processes`` says by how much TTFT, ITL and end to end differ from what
the mock did; all that lies between the two (sockets, late sending, late reading) counts as the client's. Two more runs,
with short and with long answers, say what a request and a chunk cost the client in CPU. Exit status 1 when a bar is
missed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.errors import LoadTestError
from loadtest.mock_server.process import mock_process
from loadtest.mock_server.token_log import Served, read_token_log
from loadtest.results.output import RECORDS, environment_info
from loadtest.results.percentiles import distribution
from loadtest.results.records import OK, Record, read_records, write_json_atomically
from loadtest.results.schema import Distribution, Summary

SCHEMA = "vllm-pareto/loadtest-accuracy/1"
FIGURES = ("p50", "p95", "p99", "mean", "max")
SHORT, LONG = 8, 128
CPU_RATE = 100


@dataclass(frozen=True)
class Row:
    """One quantity, in ms: as the client has it, as the mock's log has it, and client minus mock by figure."""

    name: str
    client: Distribution
    mock: Distribution
    difference: dict[str, float]


@dataclass(frozen=True)
class Bar:
    """What a difference may be at most, and what it was, in ms."""

    name: str
    limit: float
    found: float

    @property
    def holds(self) -> bool:
        """Whether it is kept."""
        return abs(self.found) <= self.limit


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write ``--out``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rate", type=float, default=500.0, help="requests per second (default: 500)")
    parser.add_argument("--processes", type=int, default=2, help="of the load generator (default: 2)")
    parser.add_argument("--duration", type=float, default=30.0, metavar="S", help="of each run (default: 30)")
    parser.add_argument("--output-tokens", type=int, default=10, metavar="N", help="of an answer (default: 10)")
    parser.add_argument("--ttft-ms", type=float, default=200.0, help="of the mock (default: 200)")
    parser.add_argument("--itl-ms", type=float, default=20.0, help="of the mock (default: 20)")
    parser.add_argument("--p50-ms", type=float, default=3.0, help="bar of the P50 of TTFT (default: 3)")
    parser.add_argument("--p95-ms", type=float, default=5.0, help="bar of the P95 of TTFT (default: 5)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.rate, args.processes, args.duration, args.output_tokens) <= 0:
        parser.error("--rate, --processes, --duration and --output-tokens must be above 0")
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    try:
        document, bars = measure(args, ["python", "-m", "loadtest.accuracy", *(sys.argv[1:] if argv is None else argv)])
        write_json_atomically(args.out, document)
    except (LoadTestError, OSError) as error:
        print(f"accuracy: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("accuracy: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"results: {args.out}")
    return 0 if all(bar.holds for bar in bars) else 1


def measure(args: argparse.Namespace, command: Sequence[str]) -> tuple[dict[str, Any], list[Bar]]:
    """Return the document, and the bars in it.

    Raises:
        LoadTestError: a run did not end, or requests of it failed.

    """
    environment = {**environment_info(), "cpu": _cpu_model(), "load_average": os.getloadavg()}
    delays = ("--ttft-ms", args.ttft_ms, "--itl-ms", args.itl_ms)
    with tempfile.TemporaryDirectory() as name:
        folder, words = Path(name), f"--rate {args.rate:g} --warmup {round(args.rate)} --processes {args.processes}"
        log = folder / "mock.jsonl"
        with mock_process(*delays, "--log", log) as mock:
            before = mock.cpu_s()
            summary, records = _run(mock.url, folder / "rate", f"{words} --output-tokens {args.output_tokens}", args)
            mock_cpu_s = mock.cpu_s() - before
            mock_command = mock.command
        rows = compare(records, list(read_token_log(log)))
        with mock_process(*delays) as mock:
            short, long = (
                _run(mock.url, folder / str(tokens), f"--rate {CPU_RATE} --output-tokens {tokens}", args)[0]
                for tokens in (SHORT, LONG)
            )
    ttft, lateness = rows[0], summary.stages[0].latency.send_lateness_ms
    assert lateness is not None
    bars = [
        Bar("TTFT P50", args.p50_ms, ttft.difference["p50"]),
        Bar("TTFT P95", args.p95_ms, ttft.difference["p95"]),
    ]
    costs = _costs(short, long)
    _print(rows, bars, lateness, summary, costs, mock_cpu_s)
    throughput = summary.stages[0].throughput
    assert throughput is not None
    document = {
        "schema": SCHEMA,
        "command": shlex.join(command),
        "load_test": f"{words} --duration {args.duration:g} --output-tokens {args.output_tokens}",
        "mock": shlex.join(["python", *mock_command[1:]]),
        "started_at": summary.started_at,
        "environment": environment,
        "load_average_after": os.getloadavg(),
        "requests": asdict(summary.stages[0].requests),
        "offered_requests_per_s": throughput.offered_requests_per_s,
        "bars": [{**asdict(bar), "holds": bar.holds} for bar in bars],
        "rows_ms": [asdict(row) for row in rows],
        "send_lateness_ms": asdict(lateness),
        "generator": asdict(summary.generator),
        "mock_cpu_percent": round(100 * mock_cpu_s / summary.duration_s, 1),
        "cpu": costs,
        "invalid": summary.stages[0].invalid,
    }
    return document, bars


def compare(records: Sequence[Record], log: Sequence[Served]) -> list[Row]:
    """Return TTFT (from the intended start), TTFT from the send, ITL and end to end, beside what the mock did.

    Args:
        records: of one stage, warm-up and all.
        log: of the mock, of the same time or longer.

    Raises:
        LoadTestError: they are not of the same requests.

    """
    measured = [record for record in records if not record.warmup]
    begin = min((record.intended_unix_s for record in measured), default=0.0)
    # The warm-up was over before, so the log's requests after that moment are the measured ones.
    served = [each for each in log if each.received_unix_s >= begin and each.token_unix_s]
    if len(served) != len(measured) or any(record.outcome != OK for record in measured):
        raise LoadTestError(f"{len(measured)} requests were measured, and {len(served)} answered by the mock")
    client: dict[str, list[float | None]] = {
        "TTFT": [record.first_token_s for record in measured],
        "TTFT from send": [(record.first_token_s or 0.0) - (record.start_s or 0.0) for record in measured],
        "ITL": [b - a for record in measured for a, b in pairwise(record.token_s)],
        "end to end": [record.end_s for record in measured],
    }
    truth: dict[str, list[float | None]] = {
        "TTFT": [each.ttft_s for each in served],
        "ITL": [b - a for each in served for a, b in pairwise(each.token_unix_s)],
        "end to end": [(each.ended_unix_s or 0.0) - each.received_unix_s for each in served],
    }
    truth["TTFT from send"] = truth["TTFT"]
    rows = []
    for name, values in client.items():
        ours, mocks = (distribution([1000 * (value or 0.0) for value in each]) for each in (values, truth[name]))
        if ours is None or mocks is None:
            continue
        difference = {figure: round(getattr(ours, figure) - getattr(mocks, figure), 4) for figure in FIGURES}
        rows.append(Row(name, ours, mocks, difference))
    return rows


def _run(url: str, out: Path, words: str, args: argparse.Namespace) -> tuple[Summary, list[Record]]:
    """Run one load test as the command does, and read its records back."""
    from loadtest.unpatched import import_locust

    import_locust()
    from loadtest import command
    from loadtest.load.runner import run_load_test
    from loadtest.settings import load_settings

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    common = f"--base-url {url} --out {out} --duration {args.duration:g} --prompt-tokens 32 --no-progress "
    print(f"pareto loadtest {words} ...", file=sys.stderr, flush=True)
    summary = run_load_test(load_settings(parser.parse_args((common + words + " --no-server-metrics").split())))
    if summary.status == "interrupted":
        raise KeyboardInterrupt
    counts = summary.stages[0].requests
    if summary.error or counts.failed or not counts.ok:
        raise LoadTestError(summary.error or f"{counts.failed} of {counts.sent} requests failed")
    return summary, list(read_records(out / RECORDS))


def _costs(short: Summary, long: Summary) -> dict[str, float]:
    """Return what a chunk and a request cost the client, in microseconds of CPU, from runs of the same rate."""
    (few, few_us), (many, many_us) = (
        (stage.requests.ok, (summary.generator.cpu_percent or 0.0) / 100 * summary.duration_s * 1e6)
        for summary in (short, long)
        for stage in summary.stages
    )
    a_chunk = (many_us / many - few_us / few) / (LONG - SHORT)
    return {
        "us_per_chunk": round(a_chunk, 2),
        "us_per_request": round(few_us / few - SHORT * a_chunk, 1),
        "us_per_chunk_of_long_answers": round(many_us / (many * LONG), 2),
    }


def _print(
    rows: Sequence[Row],
    bars: Sequence[Bar],
    lateness: Distribution,
    summary: Summary,
    costs: dict[str, float],
    mock_cpu_s: float,
) -> None:
    table = Table("ms", "", *(figure.upper() if figure[0] == "p" else figure for figure in FIGURES), box=None)
    for row in rows:
        lines = {"client": asdict(row.client), "mock": asdict(row.mock), "difference": row.difference}
        for name, values in lines.items():
            table.add_row(row.name if name == "client" else "", name, *(f"{values[each]:.2f}" for each in FIGURES))
    table.add_row("sent late by", "client", *(f"{getattr(lateness, each):.2f}" for each in FIGURES))
    Console(markup=False, emoji=False).print(table)
    for bar in bars:
        print(f"{bar.name}: {bar.found:+.2f} ms of at most {bar.limit:g}: {'kept' if bar.holds else 'MISSED'}")
    print(
        f"CPU: {costs['us_per_chunk']:.1f} us a chunk and {costs['us_per_request']:.0f} us a request; above "
        f"{summary.generator.cpu_percent:.0f}% of a core, and the mock {100 * mock_cpu_s / summary.duration_s:.0f}%"
    )
    for note in summary.stages[0].notes:
        print(f"note: {note}")


def _cpu_model() -> str:
    """Return the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
