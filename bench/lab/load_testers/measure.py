"""One run of one tool against a fresh mock server: what it said, what was true, and what it cost."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.lab.load_testers.load import ITL_MS, TTFT_MS, Load
from bench.lab.load_testers.process import Ran, run
from bench.lab.load_testers.table import COMPARED
from bench.lab.load_testers.tools.tool import Said, Target, Tool
from bench.lab.load_testers.truth import Truth, read_truth
from bench.server import serving
from kv_cache.errors import ParetoError

MODEL = "mock-model"
MOCK = (sys.executable, "-m", "loadtest.mock_server")
LIMIT_S = 120
"""Seconds after which a run counts as hung."""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "COLUMNS": "200",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Variables for every tool: nothing leaves the machine."""


def measure(tool: Tool, load: Load, tools: Path, tokenizer: Path) -> dict[str, Any]:
    """Run a tool once and return a record ready for JSON.

    It has ``exit_status``, ``seconds``, what the tool ``said`` (None without results, and then ``problem`` says why),
    the ``truth``, the ``error`` of each latency in ms, and the cost: ``startup_s`` until the first request, and
    processor time of start-up, load and wind-up (``cpu_*_s``), with that of the load ``per_request_ms`` and
    ``per_chunk_us``.

    Raises:
        ParetoError: the mock server does not start.

    """
    with tempfile.TemporaryDirectory(prefix="load-tester-") as name:
        folder = Path(name)
        out, token_log = folder / "out", folder / "tokens.jsonl"
        out.mkdir()
        flags = ["--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS), "--model", MODEL, *load.mock]
        with serving([*flags, "--log", str(token_log)], folder / "mock.log", program=MOCK, timeout_s=60) as server:
            words = tool.words(load, Target(server.base_url, MODEL, tokenizer, out))
            ran = run([str(tool.program(tools)), *words], folder / "tool.log", QUIET | tool.variables, LIMIT_S)
        text = (folder / "tool.log").read_text(errors="replace")
        said, problem = _said(tool, load, out)
        try:
            truth = read_truth(token_log, load.output_tokens)
        except ParetoError as error:
            truth, problem = None, str(error)
        if problem or ran.exit_status:
            problem = f"{problem or 'exit status'}; {_last_words(text)}"
        shown = [word.replace(server.base_url, "URL").replace(str(out), "OUT") for word in words]
        return {
            "command": shlex.join([tool.name, *(word.replace(str(tokenizer), "TOKENIZER") for word in shown)]),
            "exit_status": "hung" if ran.stopped else ran.exit_status,
            "problem": problem,
            **assess(ran, said, truth),
        }


def assess(ran: Ran, said: Said | None, truth: Truth | None) -> dict[str, Any]:
    """Return what a run said beside what was true, and what it cost; rounded to what means something."""
    record: dict[str, Any] = {
        "seconds": round(ran.ended_unix_s - ran.started_unix_s, 2),
        "said": _rounded(dataclasses.asdict(said)) if said else None,
        "truth": None,
        "error": {},
    }
    if truth is None:
        return record
    times = dataclasses.asdict(truth)
    first, last = times.pop("first_unix_s"), times.pop("last_unix_s")
    record["truth"] = _rounded(times)
    if said is not None:
        record["error"] = {
            name: round(claimed - true, 2)
            for name in COMPARED
            if (claimed := getattr(said, name)) is not None and (true := getattr(truth, name)) is not None
        }
    startup, loaded = ran.cpu_at(first), ran.cpu_at(last)
    cost = loaded - startup
    return record | {
        "startup_s": round(first - ran.started_unix_s, 2),
        "cpu_startup_s": round(startup, 3),
        "cpu_load_s": round(cost, 4),
        "cpu_windup_s": round(ran.cpu_at(ran.ended_unix_s) - loaded, 3),
        "per_request_ms": round(cost / truth.requests * 1000, 3),
        "per_chunk_us": round(cost / truth.chunks * 1e6, 1) if truth.chunks else None,
    }


def _said(tool: Tool, load: Load, out: Path) -> tuple[Said | None, str | None]:
    try:
        return tool.read(load, out), None
    except ParetoError as error:
        return None, str(error)
    except (KeyError, TypeError, ValueError) as error:
        return None, f"its results have another form: {error!r}"


def _last_words(text: str) -> str:
    lines = [line.strip(" │╭╰─╮╯\t") for line in text.splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines if "error" in line.lower()] or lines or ["it printed nothing"]
    return telling[-1][:200]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
