"""Recipes with prune steps: what their checkpoints hold, that they resume, and what the report says of them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import read_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.compress import compress
from quant_methods.methods.pruning import Magnitude, Wanda
from quant_methods.methods.rotation import Rotate
from quant_methods.methods.rtn import RTN
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.overrides import override
from quant_methods.steps import PruneStep, Step
from tests.quant_methods.test_compress import W4, Interrupted, contents, recipe

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


@pytest.mark.parametrize(
    "steps",
    [
        (Magnitude(),),
        (Magnitude(refit=True),),
        (SparseGPT(), W4),
        (SparseGPT(bits=4, group_size=64, pattern="2:4", refit=True),),
    ],
    ids=["pruned", "fitted", "then rounded", "with bits"],
)
@pytest.mark.parametrize("moment", ["block 2/3", pytest.param("writing the checkpoint", marks=pytest.mark.long)])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...], moment: str
) -> None:
    given = recipe(*steps, kv_scales=True)
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
        dataclasses.replace(W4, targets=("model.layers.1.*",)),
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


@pytest.mark.parametrize("bits", [3, 4], ids=["our format", "compressed-tensors"])
@pytest.mark.parametrize(
    "steps",
    [
        (Wanda(pattern="2:4"), dataclasses.replace(W4, symmetric=True)),
        (SparseGPT(pattern="2:4"), W4),
        (SparseGPT(pattern="2:4"), RTN(bits=4, group_size=64, symmetric=False)),
        (SparseGPT(pattern="2:4", bits=4, group_size=128, symmetric=False),),
        (SparseGPT(pattern="2:4", bits=4, group_size=128, symmetric=False, refit=True),),
    ],
    ids=lambda steps: "-".join(step.method for step in steps),
)
def test_what_was_pruned_and_rounded_reads_back_with_its_zeros(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...], bits: int
) -> None:
    given = override(recipe(*steps), {"bits": bits})
    report = compress(tiny_model, given, tmp_path / "out", text=text_file)
    assert report.serving.plugin == (bits == 3)
    model = load_reference(tmp_path / "out")
    zeros = 0
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        assert layer.zeros == int((weight == 0).sum())
        assert bits < layer.bits_per_weight < bits + 0.5
        zeros += layer.zeros
    assert 0.5 <= report.sparsity == zeros / sum(rows * columns for rows, columns in (x.shape for x in report.layers))
    # What is stored travels with the checkpoint.
    told = json.loads((tmp_path / "out" / RECIPE_FILE).read_text())["sparsity"]
    assert told == {"all": report.sparsity, **{x.name: x.zeros / (x.shape[0] * x.shape[1]) for x in report.layers}}


def test_a_product_beside_the_codes_leaves_their_zeros(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    steps = Wanda(pattern="2:4"), dataclasses.replace(W4, rank=4)
    report = compress(tiny_model, recipe(*steps), tmp_path / "out", text=text_file)
    assert report.serving.plugin
    assert report.sparsity >= 0.5
    plain = compress(tiny_model, recipe(steps[0], W4), tmp_path / "plain", text=text_file)
    assert report.layers[0].relative_error < 0.95 * plain.layers[0].relative_error
    model = load_reference(tmp_path / "out")
    assert all((model.get_submodule(layer.name).weight == 0).float().mean() < 0.01 for layer in report.layers)


def test_bits_go_to_the_step_that_rounds() -> None:
    assert override(recipe(SparseGPT(), W4), {"bits": 3, "damping": 0.2}).steps == (
        SparseGPT(damping=0.2),
        dataclasses.replace(W4, bits=3, damping=0.2),
    )
    assert override(recipe(SparseGPT()), {"bits": 3, "sparsity": 0.6}).steps == (SparseGPT(bits=3, sparsity=0.6),)


def test_what_does_not_go_together_is_one_clear_line(tiny_model: Path, tmp_path: Path) -> None:
    for steps, message in (
        ((SparseGPT(bits=4), W4), "sparsegpt with bits: 4 rounds what it leaves, and gptq would do so again; leave"),
        (
            (SparseGPT(pattern="3:5", sparsity=0.4),),
            "128 input channels, which are not whole groups of 5",
        ),
    ):
        with pytest.raises(ParetoError, match=message):
            compress(tiny_model, recipe(*steps), tmp_path / "out")
    with pytest.raises(ParetoError, match="bits: 9 is not served; use 2 to 8"):
        SparseGPT(bits=9).check()
    with pytest.raises(ParetoError, match=r"damping: 2 is not in \(0, 1\]"):
        SparseGPT(damping=2).check()


def test_a_rotated_model_can_be_pruned(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    report = compress(tiny_model, recipe(Rotate(), Wanda(pattern="2:4")), tmp_path / "out", text=text_file)
    found, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" in found
    assert all(share_of_zeros(found[f"{layer.name}.weight"]) == layer.sparsity == 0.5 for layer in report.layers)


def test_a_layer_that_no_group_fits_is_pruned_all_the_same(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    # down_proj has 192 input channels, which 128 does not divide.
    steps = Magnitude(), dataclasses.replace(W4, group_size=128, group_size_fallback="skip")
    report = compress(tiny_model, recipe(*steps), tmp_path / "out", text=text_file)
    bits = {layer.name.rsplit(".", 1)[-1]: layer.bits_per_weight for layer in report.layers}
    assert bits["down_proj"] == 16
    assert bits["up_proj"] < 5
    assert all(layer.sparsity >= 0.49 for layer in report.layers)
