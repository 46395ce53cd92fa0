"""Tables of all runs, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.lab.load_testers.load import CASES, LOADS, LONG, SHORT

Record = Mapping[str, Any]


def tables(runs: Sequence[Record]) -> str:
    """Return exactness and cost by load, and what each tool says of a server that misbehaves."""
    tools = list(dict.fromkeys(run["tool"] for run in runs))
    parts = [_exactness(runs, tools), _cost(runs, tools), _behaviour(runs, tools)]
    return "\n".join(part for part in parts if part)


def median(runs: Sequence[Record], tool: str, load: str, figure: Callable[[Record], float | None]) -> float | None:
    """Return the median of a figure over the runs of a tool under a load; None where none has it."""
    values = [figure(run) for run in runs if run["tool"] == tool and run["load"] == load and run.get("truth")]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def chunk_us(runs: Sequence[Record], tool: str) -> float | None:
    """Return the processor time of a chunk alone, in microseconds.

    It is what a request costs more with long answers than with short ones, over the chunks that it has more, with the
    same number of users.
    """
    short, long = (median(runs, tool, load, _of("per_request_ms")) for load in (SHORT, LONG))
    more = LOADS[LONG].output_tokens - LOADS[SHORT].output_tokens
    return None if short is None or long is None else (long - short) / more * 1000


def held(runs: Sequence[Record], tool: str) -> int | None:
    """Return the highest rate asked for that arrived to within 3%; None where none did."""
    rates = [
        load.rate
        for name, load in LOADS.items()
        if load.rate and (rate := median(runs, tool, name, lambda run: run["truth"]["rate"])) is not None
        if abs(rate / load.rate - 1) <= 0.03
    ]
    return max(rates, default=None)


def _of(name: str) -> Callable[[Record], float | None]:
    def figure(run: Record) -> float | None:
        value: float | None = run.get(name)
        return value

    return figure


def _error(name: str) -> Callable[[Record], float | None]:
    def figure(run: Record) -> float | None:
        value: float | None = run["error"].get(name)
        return value

    return figure


def _exactness(runs: Sequence[Record], tools: Sequence[str]) -> str:
    lines = [
        "| load | tool | TTFT P50, ms off | P95 | TPOT | E2E | rate | uneven P95, ms | said / came | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, load in LOADS.items():
        for tool in tools:
            mine = [run for run in runs if (run["tool"], run["load"]) == (tool, name) and run.get("truth")]
            if not mine:
                continue
            off = [
                _signed(median(runs, tool, name, _error(which)))
                for which in ("ttft_p50_ms", "ttft_p95_ms", "tpot_ms", "e2e_p50_ms")
            ]
            rate = median(runs, tool, name, lambda run: run["truth"]["rate"]) if load.rate else None
            uneven = median(runs, tool, name, lambda run: run["truth"]["uneven_p95_ms"]) if load.rate else None
            last = mine[-1]
            counted = last["said"]["ok"] + (last["said"]["failed"] or 0) if last["said"] else "none"
            lines.append(
                f"| {name} | {tool} | {' | '.join(off)} | {_plain(rate, 1)} | {_plain(uneven, 1)} | "
                f"{counted} / {last['truth']['requests']} | {len(mine)} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _cost(runs: Sequence[Record], tools: Sequence[str]) -> str:
    lines = [
        "| tool | start-up, s | its CPU, s | CPU a request, ms: "
        + " | ".join(LOADS)
        + " | CPU a chunk, µs | highest rate held |",
        "| --- " * (5 + len(LOADS)) + "|",
    ]
    for tool in tools:
        if not any(run["tool"] == tool and run["load"] in LOADS and run.get("truth") for run in runs):
            continue
        startup, cpu = (
            statistics.median(run[name] for run in runs if run["tool"] == tool and run.get("truth"))
            for name in ("startup_s", "cpu_startup_s")
        )
        costs = [_plain(median(runs, tool, name, _of("per_request_ms")), 2) for name in LOADS]
        rate = held(runs, tool)
        lines.append(
            f"| {tool} | {startup:.1f} | {cpu:.1f} | {' | '.join(costs)} | {_plain(chunk_us(runs, tool), 0)} | "
            f"{f'{rate}/s' if rate else '-'} |"
        )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _behaviour(runs: Sequence[Record], tools: Sequence[str]) -> str:
    lines = [
        "| server | tool | ok said / true | failed said / true | TTFT P95, ms off | TPOT, ms off | tokens said / true "
        "| exit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        for tool in tools:
            run = next((one for one in runs if (one["tool"], one["load"]) == (tool, case)), None)
            if run is None or run["truth"] is None:
                continue
            said, truth = run["said"] or {}, run["truth"]
            lines.append(
                f"| {case} | {tool} | {_or_none(said.get('ok'))} / {truth['complete']} | "
                f"{_or_none(said.get('failed'))} / {truth['requests'] - truth['complete']} | "
                f"{_signed(run['error'].get('ttft_p95_ms'))} | {_signed(run['error'].get('tpot_ms'))} | "
                f"{_or_none(said.get('output_tokens'))} / {truth['output_tokens']} | {run['exit_status']} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"


def _plain(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _or_none(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f}"
