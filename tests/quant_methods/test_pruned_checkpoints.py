"""Recipes with prune steps: what their checkpoints hold, that they resume, and what the report says of them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from quant_methods.checkpoints.checkpoint import read_tensors
from quant_methods.compress import compress
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.pruning import Magnitude, Wanda
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.steps import PruneStep
from tests.quant_methods.test_compress import Interrupted, contents, recipe

METHODS = (Magnitude, Wanda, SparseGPT)
ALL = [method(pattern=pattern) for method in METHODS for pattern in ("any", "2:4")]


def share_of_zeros(weight: torch.Tensor) -> float:
    return (weight == 0).double().mean().item()


@pytest.mark.parametrize("step", ALL, ids=lambda step: f"{step.method}-{step.pattern}")
def test_pruned_weights_are_stored_densely_with_their_zeros(
    tiny_model: Path, text_file: Path, tmp_path: Path, step: PruneStep
) -> None:
    report = compress(tiny_model, recipe(step, ignore=("lm_head", "v_proj")), tmp_path / "out", text=text_file)
    found, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    original, _ = read_tensors(tiny_model / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in original.items()}
    assert len(report.layers) == 18
    for layer in report.layers:
        stored = found.pop(f"{layer.name}.weight")
        del original[f"{layer.name}.weight"]
        assert layer.zeros == int((stored == 0).sum())
        assert share_of_zeros(stored) == pytest.approx(0.5, abs=0.01)
        if step.pattern == "2:4":
            assert ((stored.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        assert layer.bits_per_weight == 16
        assert 0 < layer.relative_error < 0.7
    assert all(torch.equal(found[name], original[name]) for name in original)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert str(report.serving) == "stock vLLM on CPU and CUDA"
    assert report.bytes_after == report.bytes_before


@pytest.mark.parametrize("step", [Magnitude(), SparseGPT()], ids=lambda step: step.method)
@pytest.mark.parametrize("moment", ["block 2/3", "writing the checkpoint"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path, step: PruneStep, moment: str
) -> None:
    given = recipe(step, kv_scales=True)
    whole = compress(tiny_model, given, tmp_path / "whole", text=text_file)

    def interrupt(done: int, total: int, what: str) -> None:
        if what == moment:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(tiny_model, given, tmp_path / "out", text=text_file, progress=interrupt)
    report = compress(tiny_model, given, tmp_path / "out", text=text_file)
    assert report.resumed_blocks == (1 if moment == "block 2/3" else 3)
    assert report.layers == whole.layers
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_layers_pruned_rounded_both_or_neither_share_a_checkpoint(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    steps = (
        Magnitude(targets=("model.layers.0.*", "model.layers.1.*")),
        GPTQ(bits=4, group_size=64, symmetric=False, targets=("model.layers.1.*",)),
    )
    report = compress(tiny_model, recipe(*steps), tmp_path / "out", text=text_file)
    found, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    original, _ = read_tensors(tiny_model / "model.safetensors")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.up_proj" in ignored
    assert share_of_zeros(found["model.layers.0.mlp.up_proj.weight"]) == pytest.approx(0.5, abs=0.01)
    assert "model.layers.1.mlp.up_proj.weight_packed" in found
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], original["model.layers.2.mlp.up_proj.weight"])
    assert {layer.bits_per_weight for layer in report.layers[:7]} == {16}
    assert all(4 < layer.bits_per_weight < 5 for layer in report.layers[7:])
    assert len(report.layers) == 14


def test_the_kind_of_weights_is_that_of_the_original(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    given = dataclasses.replace(recipe(Magnitude()), exempt=("first", "mlp"))
    report = compress(tiny_model, given, tmp_path / "out", text=text_file)
    assert {layer.name.split(".")[2] for layer in report.layers} == {"1", "2"}
    assert all(".self_attn." in layer.name for layer in report.layers)
