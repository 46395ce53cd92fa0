"""pareto compress as a person meets it."""

from pathlib import Path

import pytest

from vllm_ext.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main(["compress", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_compresses_and_reports(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small = ["--num-calibration-samples", "4", "--calibration-length", "32", "--text", text_file, "--group-size", "64"]
    status, text, _ = run(capsys, tiny_model, "--recipe", "gptq-w4", "--out", out, "--verbose", *small)
    assert status == 0
    assert (out / "model.safetensors").is_file()
    assert "21 layers at 4.3" in text
    assert "model.layers.2.mlp.down_proj" in text
    assert "serves on    CPU and CUDA" in text


def test_lists_its_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "--list-recipes")
    assert status == 0
    for name in ("gptq-w4", "rtn-w8", "kv-scales"):
        assert name in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "gptq-w5", "--out", "x"], "unknown recipe 'gptq-w5'; built-in recipes: "),
        (["--recipe", "gptq-w4"], "--out DIR is missing"),
        (["no-such-model", "--out", "x"], "model 'no-such-model' not found"),
        (
            ["--recipe", "rtn-w4", "--act-order", "--out", "x"],
            "--act-order: no step of recipe rtn-w4 has it (steps: rtn)",
        ),
        (["--bits", "3", "--out", "x"], "bits: 3 is not served by vLLM; use 4 or 8"),
        (["--bits", "8", "--out", "x"], "8-bit weights with zero-points have no kernel"),
        (["--text", "missing.txt", "--out", "x"], "missing.txt: No such file or directory"),
        (["--device", "cuda:77", "--out", "x"], "--device cuda:77 is not available here"),
        (["--num-calibration-samples", "0", "--out", "x"], "at least 1 sequence"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = run(capsys, *words)
    assert status == 2
    assert message in error
    assert error.startswith("pareto compress: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
