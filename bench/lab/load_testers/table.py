"""Tables of all runs, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.lab.load_testers.load import CASES, LOADS, LONG

Record = Mapping[str, Any]
NOTHING = "-"
COMPARED = ("ttft_p50_ms", "ttft_p95_ms", "tpot_ms", "e2e_p50_ms")


def tables(runs: Sequence[Record]) -> str:
    """Return exactness, evenness and cost by load, and what each tool says of a server that misbehaves."""
    known = [run for run in runs if run.get("truth")]
    tools = list(dict.fromkeys(run["tool"] for run in known))
    parts = [_exactness(known, tools), _evenness(known, tools), _cost(known, tools), _behaviour(known, tools)]
    return "\n".join(part for part in parts if part)


def median(runs: Sequence[Record], tool: str, load: str, figure: Callable[[Record], float | None]) -> float | None:
    """Return the median of a figure over the runs of a tool under a load; None where none has it."""
    values = [figure(run) for run in runs if run["tool"] == tool and run["load"] == load and run.get("truth")]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


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


Cell = Callable[[str, str], str]


def _table(title: str, rows: Sequence[str], tools: Sequence[str], cell: Cell) -> str:
    """Return a table with a line a row and a column a tool, without rows that nobody has anything in."""
    lines = [f"| {title} | {' | '.join(tools)} |", "| --- " * (1 + len(tools)) + "|"]
    for row in rows:
        cells = [cell(row, tool) for tool in tools]
        if any(text != NOTHING for text in cells):
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _exactness(runs: Sequence[Record], tools: Sequence[str]) -> str:
    def cell(load: str, tool: str) -> str:
        off = [median(runs, tool, load, _error(name)) for name in COMPARED]
        return NOTHING if off == [None] * len(off) else " / ".join(_signed(value) for value in off)

    return _table("TTFT P50 / P95 / TPOT / end to end, ms off the server's log", list(LOADS), tools, cell)


def _evenness(runs: Sequence[Record], tools: Sequence[str]) -> str:
    def cell(load: str, tool: str) -> str:
        rate = median(runs, tool, load, lambda run: run["truth"]["rate"])
        uneven = median(runs, tool, load, lambda run: run["truth"]["uneven_p95_ms"])
        return NOTHING if rate is None else f"{rate:.1f}/s, {_plain(uneven, 1)} ms"

    rates = [name for name, load in LOADS.items() if load.rate]
    return _table("rate that arrived, and P95 of how far from even", rates, tools, cell)


def _cost(runs: Sequence[Record], tools: Sequence[str]) -> str:
    def over_all(tool: str, name: str) -> str:
        # Of the loads alone: servers that misbehave have two tools at one time.
        values = [run[name] for run in runs if run["tool"] == tool and run["load"] in LOADS]
        return f"{statistics.median(values):.1f}" if values else NOTHING

    figures: dict[str, Callable[[str], str]] = {
        "start-up until the first request, s": lambda tool: over_all(tool, "startup_s"),
        "CPU of the start-up, s": lambda tool: over_all(tool, "cpu_startup_s"),
        **{f"CPU a request, ms: {name}": _costing(runs, name) for name in LOADS},
        f"CPU a chunk, µs: {LONG}": lambda tool: _plain(median(runs, tool, LONG, _of("per_chunk_us")), 0),
        "requests counted / that came": lambda tool: _counted(runs, tool),
        "highest rate that arrived": lambda tool: f"{rate}/s" if (rate := held(runs, tool)) else NOTHING,
    }
    return _table("cost", list(figures), tools, lambda row, tool: figures[row](tool))


def _costing(runs: Sequence[Record], load: str) -> Callable[[str], str]:
    return lambda tool: _plain(median(runs, tool, load, _of("per_request_ms")), 2)


def _counted(runs: Sequence[Record], tool: str) -> str:
    mine = [run for run in runs if run["tool"] == tool and run["load"] in LOADS and run["said"]]
    counted = sum(run["said"]["ok"] + (run["said"]["failed"] or 0) for run in mine)
    return f"{counted} / {sum(run['truth']['requests'] for run in mine)}" if mine else NOTHING


def _behaviour(runs: Sequence[Record], tools: Sequence[str]) -> str:
    def cell(case: str, tool: str) -> str:
        run = next((one for one in runs if (one["tool"], one["load"]) == (tool, case)), None)
        if run is None:
            return NOTHING
        said, truth = run["said"], run["truth"]
        if said is None:
            return f"no results, exit {run['exit_status']}"
        counted = f"{said['ok']} ok, {'?' if said['failed'] is None else said['failed']} failed"
        failures = CASES[case].planted(truth["requests"])
        true = f"{truth['complete']} ok, {failures} failed"
        words = [counted if counted == true else f"{counted} (true: {true})"]
        if not failures:
            # Nothing fails there: what matters is what becomes of the times.
            off = run["error"]
            words += [f"TTFT P95 {_signed(off.get('ttft_p95_ms'))} ms", f"TPOT {_signed(off.get('tpot_ms'))} ms"]
        return ", ".join([*words, f"exit {run['exit_status']}"])

    return _table("server", list(CASES), tools, cell)


def _signed(value: float | None) -> str:
    # A minus before a rounded zero would look like a meaning.
    return NOTHING if value is None else f"{round(value, 1) + 0.0:+.1f}"


def _plain(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
