"""Comparing compressors: our own lines, resumed; a tool that is missing keeps no other from being measured."""

import json
from pathlib import Path

import pytest

from bench.lab import compare_compressors
from quant_methods.embedded import MODELS

TEXT = " ".join(f"The {i}th parcel weighs {i * 37 % 101} grams and left on day {i % 7}." for i in range(60))


def test_lines_are_measured_once_and_shown_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    made = []

    def make(model: str, recipe: object, out: str, *words: str) -> dict[str, object]:
        made.append(Path(out).name)
        return compare_compressors.make_ours(model, recipe, out, *words)  # type: ignore[arg-type]

    # In this process: a spawned one would take seconds to import PyTorch.
    monkeypatch.setattr(compare_compressors, "in_own_process", lambda function, *words: make(*words))
    out = tmp_path / "results"
    words = [
        str(MODELS / "ref-7m"), "--text", str(tmp_path / "text.txt"), "--heldout", str(tmp_path / "text.txt"),
        "--num-sequences", "2", "--length", "32", "--num-windows", "2", "--window-tokens", "48",
        "--out", str(out), "--checkpoints", str(tmp_path / "checkpoints"),
    ]  # fmt: skip
    for bits, group in ((4, 128), (8, -1)):
        step = f"{{method: rtn, bits: {bits}, group_size: {group}, search: minmax}}"
        (tmp_path / f"plain-w{bits}.yaml").write_text(f"steps: [{step}]")
    four, eight = (str(tmp_path / f"plain-w{bits}.yaml") for bits in (4, 8))
    lines = [f"pareto:{four}", "llm-compressor:rtn-w4", f"pareto:{eight}"]
    assert compare_compressors.main([*words, "--lines", *lines]) == 2
    said = capsys.readouterr()
    assert "error: llm-compressor:rtn-w4: llm-compressor has no environment yet" in said.err
    assert made == ["pareto--plain-w4", "pareto--plain-w8"]
    rows = [line for line in said.out.splitlines() if "| pareto |" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| plain-w4", "| plain-w8"]
    document = json.loads((out / "pareto--plain-w4.json").read_text())
    assert document["schema"] == "vllm-pareto/compare-compressors/1"
    worse, better = (json.loads((out / f"pareto--plain-w{bits}.json").read_text())["kl"]["value"] for bits in (4, 8))
    assert 0 < better < 0.5 * worse
    assert document["cost"]["seconds"] > 0
    assert (out / "table.md").read_text() == said.out.lstrip()
    assert (out / "kl.png").stat().st_size > 1000
    assert not list((tmp_path / "checkpoints").iterdir())
    # What has a result is not made again, and a line alone shows with the others.
    assert compare_compressors.main([*words, "--lines", f"pareto:{eight}"]) == 0
    assert made == ["pareto--plain-w4", "pareto--plain-w8"]
    assert capsys.readouterr().out == said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lines", "gptq-w4"], "--lines gptq-w4: expected TOOL:RECIPE"),
        (["--lines", "gptq:gptq-w4"], "unknown tool 'gptq'; tools: pareto, llm-compressor, autoawq, autogptq"),
        (["--backend-python", "autoawq"], "--backend-python autoawq: expected TOOL=PATH"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = ["ref-7m", "--heldout", str(tmp_path / "x.txt"), "--out", str(tmp_path)]
    assert compare_compressors.main([*needed, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
