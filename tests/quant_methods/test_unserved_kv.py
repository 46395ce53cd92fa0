"""Models whose KV cache no quantized dtype serves: scales are refused, or left out where they are a by-product."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quant_methods import kv_scales
from quant_methods.model_source import read_config
from tests.quant_methods.conftest import TOKENIZER_FILES
from vllm_ext.cli import main

SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 8192,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GQA: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
LATENT: dict[str, Any] = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 64, "first_k_dense_replace": 2,
}  # fmt: skip
MODELS: dict[str, tuple[Any, str]] = {
    "narrow heads": (
        transformers.LlamaConfig(**SHAPE, **GQA, head_dim=32),
        "a quantized KV cache does not serve head size 32 (it serves 64, 80, 96, 128, 256)",
    ),
    "latent": (transformers.DeepseekV2Config(**SHAPE, **LATENT), "does not serve multi-head latent attention"),
}
SMALL = ["--num-calibration-samples", "4", "--calibration-length", "32"]


@pytest.fixture(params=MODELS)
def unserved(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> tuple[Path, str]:
    """A model, and what is to be said of it."""
    config, reason = MODELS[request.param]
    return write(config, tiny_model, tmp_path / "model"), reason


def write(config: Any, tokenizer: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def compress(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main(["compress", *map(str, words), *SMALL])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("more", [[], ["--kv-budget", "3.5bits"]], ids=["scales", "bits"])
def test_kv_scales_are_refused_before_any_work(
    unserved: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    model, reason = unserved
    status, _, error = compress(capsys, model, "--recipe", "kv-scales", "--out", tmp_path / "out", *more)
    assert status == 2
    assert reason in error
    assert "serve model with --kv-cache-dtype auto" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_calibration_at_start_up_is_too(
    unserved: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reason = unserved
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # The command sets it too.
    assert kv_scales.main([str(model), str(tmp_path / "scales")]) == 1
    assert reason in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "scales").exists()


@pytest.fixture
def narrow(tiny_model: Path, tmp_path: Path) -> Path:
    return write(MODELS["narrow heads"][0], tiny_model, tmp_path / "model")


@pytest.mark.parametrize("name", ["rtn-w4", "gptq-w4"])
def test_a_recipe_for_weights_leaves_them_out_and_says_so(
    narrow: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    status, text, _ = compress(capsys, narrow, "--recipe", name, "--text", text_file, "--out", tmp_path / "out")
    assert status == 0
    notes = [line for line in text.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: no KV scales are made: {MODELS['narrow heads'][1]}; serve with --kv-cache-dtype auto"]
    assert "KV scales    calibrated" not in text
    assert not (tmp_path / "out" / "kv_scales").exists()
    assert read_config(tmp_path / "out")["quantization_config"]


def test_a_budget_for_them_is_refused_there_too(
    narrow: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--recipe", "rtn-w4", "--kv-budget", "3.5bits", "--text", str(text_file), "--out", str(tmp_path / "out")]
    status, _, error = compress(capsys, narrow, *words)
    assert status == 2
    assert f"--kv-budget 3.5bits: {MODELS['narrow heads'][1]}" in error
    assert not (tmp_path / "out.partial").exists()


def test_without_scales_nothing_is_said(narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = compress(capsys, narrow, "--recipe", "rtn-w4", "--no-kv-scales", "--out", tmp_path / "out")
    assert status == 0
    assert "note: " not in text
    assert json.loads((tmp_path / "out" / "pareto_recipe.json").read_text())["calibration"] is None
