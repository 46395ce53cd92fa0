"""A serve-bench as a table: for the terminal, for Markdown, and for the report's page."""

from __future__ import annotations

from rich.table import Table

from bench.engine import plain_dtype
from bench.speed.command import ratio_text, spread_text
from bench.speed.schema import Spread
from bench.speed.served_schema import Memory, ServeBenchReport, ServedDtype, ServedPoint
from kv_cache.sizes import readable

HEADINGS = (
    "KV-cache dtype", "users x context", "output tokens/s", "speed", "prefill tokens/s", "speed", "TTFT P50 / P95 ms",
    "TPOT P50 / P95 ms", "end to end P50 / P95 ms", "J/token prefill, net", "J/token decode, net", "energy",
    "weights + cache, peak memory", "KV tokens",
)  # fmt: skip


def cells(report: ServeBenchReport) -> tuple[list[str], list[list[str]]]:
    """Return the headings for which there are figures, and the rows of text under them."""
    rows = _lines(report)
    shown = [index for index in range(len(HEADINGS)) if index < 2 or any(row[index] not in ("", "-") for row in rows)]
    return [HEADINGS[index] for index in shown], [[row[index] for index in shown] for row in rows]


def _lines(report: ServeBenchReport) -> list[list[str]]:
    made = []
    for row in report.dtypes:
        name = plain_dtype(row.kv_cache_dtype)
        if row.kv_cache is None or row.memory is None:
            made.append([name, f"not measured: {row.error}", *[""] * (len(HEADINGS) - 2)])
            continue
        made += [[name, *_line(row, point, row.memory)] for point in row.points]
    return made


def _line(row: ServedDtype, point: ServedPoint, memory: Memory) -> list[str]:
    energy = point.energy
    return [
        f"{point.batch} x {point.context:,}",
        spread_text(point.output_tokens_per_s, ",.0f"),
        ratio_text(point.output_ratio),
        spread_text(point.prefill_tokens_per_s, ",.0f"),
        ratio_text(point.prefill_ratio),
        _pair(point.ttft_p50_ms, point.ttft_p95_ms, ",.0f"),
        _pair(point.tpot_p50_ms, point.tpot_p95_ms, ".2f"),
        _pair(point.e2e_p50_ms, point.e2e_p95_ms, ",.0f"),
        _pair(energy.prefill, energy.prefill_net, ".4g", ", ") if energy else "-",
        _pair(energy.decode, energy.decode_net, ".4g", ", ") if energy else "-",
        ratio_text(point.decode_energy_ratio),
        f"{_bytes(memory.weights)} + {_bytes(memory.kv_cache)}, {_bytes(memory.peak)}",
        f"{row.kv_cache.tokens:,}" if row.kv_cache else "-",
    ]


def _bytes(count: int | None) -> str:
    return "-" if count is None else readable(count)


def _pair(first: Spread | None, second: Spread | None, form: str, between: str = " / ") -> str:
    if first is None:
        return "-"
    return f"{first.median:{form}}{between}" + ("-" if second is None else f"{second.median:{form}}")


def notes(report: ServeBenchReport) -> list[str]:
    """Return what to know before the figures are trusted, each once."""
    found: dict[str, list[str]] = {}
    for row in report.dtypes:
        for point in row.points:
            for note in point.notes:
                found.setdefault(note, []).append(
                    f"{plain_dtype(row.kv_cache_dtype)} {point.batch} x {point.context:,}"
                )
    everywhere = sum(len(row.points) for row in report.dtypes)
    return [note if len(places) == everywhere else f"{', '.join(places)}: {note}" for note, places in found.items()]


def _title(report: ServeBenchReport) -> str:
    baseline = plain_dtype(report.baseline)
    return f"Endpoint of {report.model}; ratios to {baseline}: speed above 1 and energy below 1 is better"


def table(report: ServeBenchReport) -> Table:
    """Return the result as a table for the terminal."""
    result = Table(title=_title(report))
    headings, rows = cells(report)
    for index, heading in enumerate(headings):
        result.add_column(heading, justify="left" if index < 2 else "right")
    for row in rows:
        result.add_row(*row)
    return result


def markdown(report: ServeBenchReport) -> str:
    """Return the result as a Markdown document."""
    settings, environment, energy = report.settings, report.environment, report.energy
    headings, rows = cells(report)
    if energy.missing:
        counted = f"Energy cannot be measured: {energy.missing}."
    else:
        step = "" if energy.resolution_s is None else f", which moves every {1000 * energy.resolution_s:.0f} ms"
        counted = f"Energy: {energy.name} ({', '.join(energy.devices)}){step}."
    head = [
        f"# {_title(report)}",
        "",
        f"Median of {settings['rounds']} alternating rounds (slowest and fastest in brackets), answers of "
        f"{settings['output_tokens']} tokens, requests started for {settings['duration_s']:g} s. {counted} "
        f"{environment['machine']}, {environment['versions']}, commit {environment['commit']}.",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + " --- |" * len(headings),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {note}" for note in notes(report)),
    ]
    return "\n".join(head).rstrip() + "\n"
