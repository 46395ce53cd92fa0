"""pareto compress as a person meets it."""

import os
import subprocess
import sys
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


def test_says_how_many_stored_weights_are_zero(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--num-calibration-samples", "4", "--calibration-length", "32", "--text", text_file, "--no-kv-scales"]
    words = ["--recipe", "wanda-50", "--pattern", "1:4", "--sparsity", "0.75", "--verbose"]
    status, text, _ = run(capsys, tiny_model, *words, "--out", tmp_path / "out", *small)
    assert status == 0
    assert "zeros        75.00% of the pruned layers' weights, as they are stored; 75.00% (model.layers." in text
    assert text.count("75.00%") == 21 + 3, "every layer, and their mean, least and most"


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


@pytest.mark.parametrize(("flag", "said"), [("--no-symmetric", True), ("--symmetric", False)])
def test_a_format_that_is_slow_on_cuda_is_said_before_it_is_made(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, said: bool
) -> None:
    words = ["--recipe", "rtn-w8a16", flag, "--group-size", "64", "--search", "minmax", "--no-kv-scales"]
    status, text, _ = run(capsys, tiny_model, *words, "--out", tmp_path / "out")
    assert status == 0
    assert ("note: 8-bit weights with zero-points have no CUDA kernel" in text) == said


def test_lists_its_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "--list-recipes")
    assert status == 0
    for name in ("gptq-w4", "rtn-w8", "kv-scales", "gptq-w3", "wanda-2of4", "sparsegpt-2of4-w4"):
        assert name in text
    assert "vLLM with this plugin" in " ".join(text.split())


def test_finds_widths_for_a_budget(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--num-calibration-samples", "4", "--calibration-length", "32", "--text", text_file, "--group-size", "64"]
    status, text, _ = run(
        capsys, tiny_model, "--recipe", "rtn-w4", "--budget", "4.6bits", "--widths", "3", "4", "6", "--no-kv-scales",
        "--sensitivity", "hessian", "--exempt", "embeddings", "--out", tmp_path / "out", *small,
    )  # fmt: skip
    assert status == 0
    assert "widths chosen for 4.6bits" in text
    assert "model.layers.0.self_attn.{q_proj,k_proj,v_proj}" in text
    assert "vLLM with this plugin" in text
    assert (tmp_path / "out" / "pareto_sensitivity.png").is_file()


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
        (["--per-tensor", "--out", "x"], "per_tensor means one group: give group_size -1 with it, not 128"),
        (["--no-outlier-handling", "--out", "x"], "recipe gptq-w4 does nothing about outliers"),
        (["--exempt", "middle", "--out", "x"], "exempt: 'middle' is unknown; names: embeddings, first, last"),
        (["--exempt", "mlp", "attention", "--out", "x"], "attention and mlp together leave nothing to compress"),
        (["--sweep", "x.yaml", "--sensitivity", "owl", "--out", "x"], "--sensitivity owl does not go with --sweep"),
        (["--budget", "4.25", "--out", "x"], "budget '4.25': expected bits a weight, a size, or a share of zeros"),
        (["--budget", "2bits", "--out", "x"], "less than the narrowest widths take (3.188bits); raise it"),
        (["--budget", "20bits", "--out", "x"], "leaves every layer at 16 bits"),
        (["--budget", "4bits", "--widths", "3", "9", "--out", "x"], "width 9: bits: 9 is not served"),
        (["--budget", "4bits", "--recipe", "kv-scales", "--out", "x"], "has no step that rounds or prunes weights"),
        (["--widths", "3", "--out", "x"], "--widths is for --budget; give both or neither"),
        (["--sweep", "missing.yaml", "--out", "x"], "sweep missing.yaml: No such file or directory"),
        (["--sweep", "g.yaml", "--bits", "4", "--out", "x"], "--bits does not go with --sweep; put it under grid"),
        (["--statistics", "--percentile", "7", "--out", "x"], "--percentile from 50 to 100"),
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


SEES_TORCH = """
import os, sys
class Finder:
    def find_spec(self, name, *others):
        if name == "torch":
            sys.exit(f"{os.environ.get('OMP_WAIT_POLICY')} {os.environ.get('GOMP_SPINCOUNT')}")
sys.meta_path.insert(0, Finder())
from vllm_ext.cli import main
main(["compress", "nowhere", "--out", "out"])
"""


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(given: str | None) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    words = [sys.executable, "-c", SEES_TORCH]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ("ACTIVE None" if given else "None 10000")
