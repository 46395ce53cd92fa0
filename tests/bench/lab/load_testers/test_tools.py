"""What each tool is told, and what is read of its results. The JSON files are cut from what the tools really wrote.

They were recorded with 20 requests at 20 a second, of which every 5th got an HTTP 500; genai-bench had 4 users.
"""

import json
from pathlib import Path

import pytest

from bench.lab.load_testers.load import CASES, LOADS, Load
from bench.lab.load_testers.tools.registry import TOOLS
from bench.lab.load_testers.tools.tool import Target
from kv_cache.errors import ParetoError

RECORDED = {
    # tool: ok, failed, TTFT P50 and P95, TPOT, end to end in ms, output tokens
    "pareto": (16, 4, 203.988, 207.232, 19.983, 503.5, 256),
    "guidellm": (16, 4, 203.749, 210.676, 19.985, 505, 256),
    "aiperf": (16, 4, 204.265, 208.378, 19.92, 503.152, 256),
    "vllm": (16, 4, 203.25, 204.484, 20.015, 503.691, 256),
    "genai-bench": (24, 5, 210.431, 230.729, 20.317, 522.093, 384),
}


def play(tool: str, out: Path) -> None:
    """Lay a tool's recorded results where it would have written them."""
    recorded = json.loads((Path(__file__).parent / f"{tool}.json").read_text())
    path = out / recorded["file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recorded["content"]))


@pytest.mark.parametrize(("tool", "expected"), RECORDED.items())
def test_recorded_results_are_read(tool, expected, tmp_path):
    play(tool, tmp_path)
    said = TOOLS[tool].read(LOADS["20/s"], tmp_path)
    found = (said.ok, said.failed, said.ttft_p50_ms, said.ttft_p95_ms, said.tpot_ms, said.e2e_p50_ms)
    assert (*found, said.output_tokens) == pytest.approx(expected, abs=0.5e-3)
    assert said.requests_per_s == pytest.approx(11, abs=4)


def test_every_tool_was_recorded():
    assert set(RECORDED) == set(TOOLS)


def test_what_tools_say_of_failures_and_of_themselves_is_kept(tmp_path):
    for tool in ("pareto", "guidellm", "aiperf", "genai-bench"):
        play(tool, tmp_path / tool)
    warnings = {tool: TOOLS[tool].read(LOADS["20/s"], tmp_path / tool).warnings for tool in RECORDED if tool != "vllm"}
    assert warnings["pareto"] == ("4 http_5xx",)
    assert "bottlenecked" in warnings["guidellm"][0] or "generation delay" in warnings["guidellm"][0]
    assert warnings["aiperf"][0].startswith("4 ")
    assert warnings["genai-bench"] == ("5 with code 500",)


def test_vllm_bench_writes_zeros_without_a_success(tmp_path):
    play("vllm", tmp_path)
    path = tmp_path / "result.json"
    zeros = {name: 0 for name in json.loads(path.read_text())}
    path.write_text(json.dumps(zeros))
    said = TOOLS["vllm"].read(LOADS["20/s"], tmp_path)
    assert (said.ok, said.ttft_p50_ms, said.tpot_ms) == (0, None, None)


@pytest.mark.parametrize("tool", TOOLS)
def test_without_results_one_line_says_so(tool, tmp_path):
    with pytest.raises(ParetoError) as caught:
        TOOLS[tool].read(LOADS["20/s"], tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_told_the_load(tool):
    target = Target("http://127.0.0.1:1", "mock-model", Path("/tokens"), Path("/out"))
    closed = " ".join(TOOLS[tool].words(Load(77, users=13, output_tokens=19), target))
    for part in ("77", "13", "19", "http://127.0.0.1:1"):
        assert part in closed
    load = Load(77, rate=31, users_instead=9)
    shown = " ".join(TOOLS[tool].words(load, target))
    assert ("9" if tool == "genai-bench" else "31") in shown


def test_only_what_a_tool_can_do_is_asked_of_it():
    lacking = {tool: [name for name, load in (LOADS | CASES).items() if TOOLS[tool].lacks(load)] for tool in TOOLS}
    assert lacking.pop("genai-bench") == ["20/s", "100/s", "300/s"]
    assert not any(lacking.values())
