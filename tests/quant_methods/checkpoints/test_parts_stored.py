"""Steps that keep something beside the codes, from compress() to the model that the checkpoint means."""

import dataclasses
from pathlib import Path

import pytest
import torch

from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import read_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.rtn import RTN
from quant_methods.methods.squeezellm import SqueezeLLM
from quant_methods.methods.trellis import Trellis
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import RoundStep

STEPS = {
    "tables": SqueezeLLM(bits=4, sparse=0.01),
    "trellis": Trellis(bits=4),
    "outliers": GPTQ(bits=4, group_size=64, outliers=0.03, outlier_bits=8),
    "llm-int8": RTN(bits=8, group_size=-1, activations="int8", outliers=0.02),
    "zeroquant": GPTQ(bits=4, group_size=64, symmetric=False, activations="int8", rank=4),
    "all": SqueezeLLM(bits=3, sparse=0.01, outliers=0.03, rank=2),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_stored_model_is_near_the_original(
    tiny_model: Path, text_file: Path, tmp_path: Path, step: RoundStep
) -> None:
    recipe = Recipe("test", steps=(step,), calibration=Calibration(num_samples=6, length=32), kv_scales=False)
    report = compress(tiny_model, recipe, tmp_path / "out", text=text_file)
    plain: RoundStep = GPTQ(bits=step.bits, group_size=64)
    if not isinstance(step, SqueezeLLM | Trellis):
        plain = dataclasses.replace(step, outliers=0.0, rank=0)
    assert report.serving.plugin
    assert report.bits_per_weight > step.bits
    tensors, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    stored = {name.removeprefix("model.layers.1.self_attn.") for name in tensors if "layers.1.self_attn." in name}
    assert ("q_proj.column_index" in stored) == (step.outliers > 0)
    assert ("q_proj.low_rank_up" in stored) == (step.rank > 0)
    assert ("q_proj.weight_trellis" in stored) == isinstance(step, Trellis)
    assert ("q_proj.weight_table" in stored) == isinstance(step, SqueezeLLM)
    if step.outliers:
        kept = [tensors[f"model.layers.1.self_attn.{name}.column_index"] for name in ("q_proj", "k_proj", "v_proj")]
        assert torch.equal(kept[0], kept[1])
        assert torch.equal(kept[0], kept[2])
    tokens = load_sequences(tiny_model, text_file, 6, 32, 0)
    with torch.no_grad():
        wanted = load_reference(tiny_model)(tokens).logits
        found = load_reference(tmp_path / "out")(tokens).logits
        compress(
            tiny_model,
            Recipe("plain", steps=(plain,), calibration=recipe.calibration, kv_scales=False),
            tmp_path / "plain",
            text=text_file,
        )
        usual = load_reference(tmp_path / "plain")(tokens).logits
    # On the calibration text itself, so that few tokens of it do.
    assert (found - wanted).norm() < 1.05 * (usual - wanted).norm()
