"""Runs `pareto loadtest`, guidellm, aiperf, `vllm bench serve` and genai-bench against one mock server, side by side.

Each is run by its own command line, as its users do, against a mock server with known delays (200 ms to the first
token, 20 ms between tokens) that is started fresh for every run and logs when each token left: that log is the truth
which every tool's figures are held against. Processor time is that of all processes of the tool, from the first request
to the last answer. Tools take turns, so that what else the machine does meets all of them.

The first round has every load and servers that misbehave, further rounds the loads only; medians count. No run starts
after --minutes. The file is written after every run, and the same command goes on where it stopped: give it once more
for the rounds that are missing.

The tools of others live in environments of their own, one folder each:

    python -m venv TOOLS/guidellm && TOOLS/guidellm/bin/pip install guidellm==0.8.1
    python -m venv TOOLS/aiperf && TOOLS/aiperf/bin/pip install aiperf==0.13.0
    python -m venv TOOLS/genai-bench && TOOLS/genai-bench/bin/pip install genai-bench==0.0.5

    python -m bench.lab.load_testers --tools TOOLS --out results/loadtest-peers/peers.json
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.environment import environment
from bench.files import read_json, write_json, write_text
from bench.lab.load_testers.load import CASES, ITL_MS, LOADS, TTFT_MS, Load
from bench.lab.load_testers.measure import measure
from bench.lab.load_testers.table import tables
from bench.lab.load_testers.tokenizer import write_tokenizer
from bench.lab.load_testers.tools.registry import TOOLS
from bench.lab.load_testers.tools.tool import Tool
from kv_cache.errors import ParetoError

SCHEMA = "vllm-pareto/load-testers/1"
MARK = "<!-- python -m bench.lab.load_testers --page -->\n"
"""Stands before and after the tables on a page."""
BESIDE = 2
"""Runs at one time against servers that misbehave."""
Run = tuple[int, str, str]
"""Round, load and tool."""


def version(tool: Tool, folder: Path) -> str:
    """Return a tool's version.

    Raises:
        ParetoError: it is not installed; the message says how to.

    """
    python = tool.python(folder)
    code = f"import importlib.metadata as m; print(m.version({tool.package!r}))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        found = None
    if found is None or found.returncode != 0 or not tool.program(folder).exists():
        place = python.parent
        how = (
            f"python -m venv {place.parent} && {place}/pip install {tool.requirement}"
            if tool.requirement
            else f"pip install {tool.package}"
        )
        raise ParetoError(f"not installed: {how}")
    return found.stdout.strip()


def planned(rounds: int, tools: Sequence[str], loads: Sequence[str]) -> Iterator[Run]:
    """Yield every run as round, load and tool: tools take turns, and who is first changes from round to round."""
    for number in range(rounds):
        begin = number % len(tools)
        turn = [*tools[begin:], *tools[:begin]]
        for name in loads:
            if number == 0 or name in LOADS:
                yield from ((number, name, tool) for tool in turn)


def batches(todo: Sequence[Run]) -> Iterator[list[Run]]:
    """Yield what runs at one time: loads alone; servers that misbehave by twos, as nothing is timed closely there."""
    batch: list[Run] = []
    for one in todo:
        if batch and (one[1] in LOADS or batch[0][1] in LOADS or len(batch) == BESIDE):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def earlier(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return what a file has already; without one, no runs.

    Raises:
        ParetoError: it was measured with something else, so that medians over both would mean nothing.

    """
    if not out.exists():
        return {"tools": {}, "unavailable": {}, "commands": {}, "runs": []}
    found = read_json(out)
    for key in ("schema", "mock", "loads", "environment", "tools"):
        then, now = (found.get(key) if isinstance(found, dict) else None), about[key]
        if key == "environment":
            then, now = _unmarked(then), _unmarked(now)
        if key == "tools" and isinstance(then, dict):
            # A tool that joins later is no difference; another version of one is.
            then, now = ({name: side[name] for name in sorted(then.keys() & now)} for side in (then, now))
        if then != now:
            raise ParetoError(f"{out} was measured with another {key}: name another file, or remove it")
    return dict(found)


def _unmarked(environment: Any) -> Any:
    """Return an environment without the mark of changed files: the file of results and the page are such themselves."""
    if not isinstance(environment, dict):
        return environment
    return environment | {"commit": str(environment.get("commit")).removesuffix("+changes")}


def with_tables(page: Path, text: str) -> str:
    """Return a page with ``text`` between its marks.

    Raises:
        ParetoError: it cannot be read, or has no marks.

    """
    try:
        parts = page.read_text(encoding="utf-8").split(MARK)
    except OSError as error:
        raise ParetoError(f"--page {page}: {error.strerror}") from error
    if len(parts) != 3:
        raise ParetoError(f"--page {page}: expected two lines {MARK.strip()}, with the tables between them")
    return f"{parts[0]}{MARK}{text}{MARK}{parts[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the file after every run, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lab.load_testers",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tools", type=Path, default=Path("load-testers"), metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(TOOLS), default=list(TOOLS), metavar="TOOL", help="run these"
    )
    every = [*LOADS, *CASES]
    parser.add_argument(
        "--loads", nargs="+", choices=every, default=every, metavar="LOAD",
        help=f"of: {', '.join(every)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=12, help="start no run after that (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON; tables go beside it as .md")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="put the tables between this page's marks, too")
    args = parser.parse_args(argv)
    try:
        if args.page:
            with_tables(args.page, "")
        if args.rounds < 1 or args.minutes <= 0:
            raise ParetoError("--rounds and --minutes must be above 0")
        runs = _run(args)
    except ParetoError as error:
        print(f"load_testers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"load_testers: interrupted; the same command goes on from what {args.out} has", file=sys.stderr)
        return 130
    text = tables(runs)
    write_text(args.out.with_suffix(".md"), text)
    if args.page:
        write_text(args.page, with_tables(args.page, text))
    print(text, end="")
    return 0


def _run(args: argparse.Namespace) -> list[dict[str, Any]]:
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in args.only:
        try:
            found[name] = version(TOOLS[name], args.tools)
        except ParetoError as error:
            missing[name] = str(error)
            print(f"{name}: left out: {error}", file=sys.stderr)
    if not found:
        raise ParetoError("no tool to run")
    loads: dict[str, Load] = LOADS | CASES
    about = {
        "schema": SCHEMA,
        "mock": {"ttft_ms": TTFT_MS, "itl_ms": ITL_MS},
        "loads": {name: _as_json(load) for name, load in loads.items()},
        "tools": found,
        "environment": environment(),
    }
    before = earlier(args.out, about)
    runs: list[dict[str, Any]] = before["runs"]
    done = {(run["round"], run["load"], run["tool"]) for run in runs}
    todo = [
        one for one in planned(args.rounds, list(found), args.loads)
        if one not in done and TOOLS[one[2]].lacks(loads[one[1]]) is None
    ]  # fmt: skip
    tools = before["tools"] | found
    unavailable = {name: why for name, why in (before["unavailable"] | missing).items() if name not in tools}
    commands: dict[str, dict[str, str]] = before["commands"]
    head = about | {"tools": tools, "unavailable": unavailable, "command": sys.argv[1:], "commands": commands}
    # A place that cannot be written is better known before the first run than after it.
    write_json(args.out, head | {"runs": runs})
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="load-testers-") as work:
        tokenizer = Path(work) / "tokenizer"
        write_tokenizer(tokenizer)
        left = len(todo)
        for batch in batches(todo):
            if time.monotonic() - began > args.minutes * 60:
                print(f"--minutes {args.minutes:g} are over, {left} runs are left: the same command goes on")
                break
            with ThreadPoolExecutor(len(batch)) as pool:
                records = list(
                    pool.map(lambda one: measure(TOOLS[one[2]], loads[one[1]], args.tools, tokenizer), batch)
                )
            left -= len(batch)
            for (number, name, tool), record in zip(batch, records, strict=True):
                commands.setdefault(tool, {})[name] = record.pop("command")
                runs.append({"tool": tool, "load": name, "round": number, **record})
                print(f"{left} left; {tool}, {name}: {_in_words(record)}", flush=True)
            write_json(args.out, head | {"runs": runs})
    return runs


def _in_words(record: dict[str, Any]) -> str:
    words = [f"{record['seconds']:.0f} s", f"exit {record['exit_status']}"]
    if "ttft_p95_ms" in record["error"]:
        words.append(f"TTFT P95 off by {record['error']['ttft_p95_ms']:+.1f} ms")
    if record["problem"]:
        words.append(record["problem"])
    return ", ".join(words)


def _as_json(load: Load) -> dict[str, Any]:
    return dataclasses.asdict(load) | {"mock": list(load.mock)}


if __name__ == "__main__":
    sys.exit(main())
