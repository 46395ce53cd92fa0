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
    assert "served by    stock vLLM on CPU and CUDA" in text


def test_says_where_the_format_of_ours_is_served(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--recipe",
        "rtn-w3",
        "--search",
        "minmax",
        "--group-size",
        "64",
        "--no-kv-scales",
        "--out",
        tmp_path / "out",
    ]
    status, text, _ = run(capsys, tiny_model, *words)
    assert status == 0
    # 3 bits, and for each 64 weights a scale of 16 bits and a zero-point of 8.
    assert "21 layers at 3.375 bits a weight" in text
    assert "served by    vLLM with this plugin on CPU and CUDA" in text
    assert "stock vLLM does not know its format" in text


def test_lists_its_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "--list-recipes")
    assert status == 0
    for name in ("gptq-w4", "rtn-w8", "kv-scales", "gptq-w3"):
        assert name in text
    assert "vLLM with this plugin" in " ".join(text.split())


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
        (["--bits", "9", "--out", "x"], "bits: 9 is not served; use 2 to 8"),
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
