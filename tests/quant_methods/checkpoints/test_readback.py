"""Weights read back as the model has them, against the model that the checkpoint means."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.checkpoints.readback import ReadBack
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Recipe
from tests.quant_methods.checkpoints.test_stored_layers import PLAIN, words, write

CPU = torch.device("cpu")
LAYER = "model.layers.0.mlp.up_proj"
pytestmark = pytest.mark.usefixtures("one_thread")


def read_back(checkpoint: Path) -> ReadBack:
    settings = AutoConfig.from_pretrained(checkpoint)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    return ReadBack(checkpoint, model, CPU)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_checkpoints_of_ours_are_read_as_they_are_meant(tiny_model: Path, tmp_path: Path, bits: int) -> None:
    compress(tiny_model, Recipe("r", steps=(RTN(bits=bits, group_size=32),), kv_scales=False), tmp_path / "out")
    expected = load_reference(tmp_path / "out").state_dict()
    found = read_back(tmp_path / "out")
    names = set(expected) - {"lm_head.weight"}  # tied to the embedding
    assert names == set(found.parameters)
    for name in names:
        assert torch.equal(found.read(name).float(), expected[name]), name
    assert torch.equal(found.read(f"{LAYER}.weight"), found.read(f"{LAYER}.weight"))
    with pytest.raises(ParetoError, match=r"the checkpoint lacks model\.other"):
        found.read("model.other")


def test_float8_with_scales_of_rows_and_of_blocks(tiny_model: Path, tmp_path: Path) -> None:
    codes = torch.randn(192, 128, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    rows, blocks = torch.rand(192, 1) + 0.5, torch.rand(2, 1) + 0.5
    group = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}, "input_activations": None}
    for name, scale, settings, expected in (
        ("rows", {"weight_scale": rows}, {"quant_method": "compressed-tensors", "config_groups": {"g": group}}, rows),
        ("one", {"weight_scale": rows[:1, 0]}, {"quant_method": "fp8"}, rows[:1]),
        (
            "blocks",
            {"weight_scale_inv": blocks},
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            blocks.repeat_interleave(128, 0)[:192],
        ),
    ):
        out = write(tiny_model, tmp_path / name, {"weight": codes, **scale}, settings)
        assert torch.equal(read_back(out).read(f"{LAYER}.weight"), codes.float() * expected)
    out = write(tiny_model, tmp_path / "none", {"weight": codes}, {"quant_method": "fp8"})
    with pytest.raises(ParetoError, match="8-bit floating point and has no scale"):
        read_back(out).read(f"{LAYER}.weight")
    out = write(tiny_model, tmp_path / "odd", {"weight": codes, "weight_scale": rows[:5]}, {"quant_method": "fp8"})
    with pytest.raises(ParetoError, match=r"scales \[5, 1\] of .* do not belong to a weight of \[192, 128\]"):
        read_back(out).read(f"{LAYER}.weight")


def test_a_quantization_that_nothing_reads_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    out = write(tiny_model, tmp_path / "q", {"weight": torch.ones(192, 64, dtype=torch.uint8)}, {"quant_method": "hqq"})
    with pytest.raises(ParetoError, match="quantized by 'hqq'"):
        Decoder(out)


MIXTURES: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(num_local_experts=4, sliding_window=None),
}
for settings in MIXTURES.values():
    settings.update({
        "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 256, "max_position_embeddings": 128,
    })  # fmt: skip


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES[request.param]).bfloat16().save_pretrained(tmp_path / "moe")
    assert any("experts.3." in name for name in load_file(tmp_path / "moe" / "model.safetensors")), "one by one"
    return tmp_path / "moe"


def same_as_loaded(found: ReadBack, plain: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    assert set(expected) == set(found.parameters)
    for name, parameter in expected.items():
        assert torch.equal(found.read(name).float(), parameter), name


def test_experts_are_joined_as_the_model_has_them(mixture: Path) -> None:
    same_as_loaded(read_back(mixture), mixture)


def test_quantized_experts_too(mixture: Path, tmp_path: Path) -> None:
    """Every expert in GPTQ's layout; the plain checkpoint holds what they mean."""
    tensors = load_file(mixture / "model.safetensors")
    stored: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors[name].shape
        codes = torch.randint(0, 16, (columns, rows), generator=generator)
        zeros = torch.randint(1, 16, (columns // 32, rows), generator=generator)
        scales = torch.rand((columns // 32, rows), generator=generator).half() / 8
        module, spread = name.removesuffix(".weight"), torch.arange(columns) // 32
        stored |= {
            f"{module}.qweight": words(codes.T, PLAIN).T.contiguous(),
            f"{module}.qzeros": words(zeros - 1, PLAIN),
            f"{module}.scales": scales,
        }
        tensors[name] = ((codes - zeros[spread]).float() * scales[spread].float()).T.contiguous()
    shutil.copytree(mixture, tmp_path / "quantized", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, mixture / "model.safetensors", {"format": "pt"})
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(kept | stored, tmp_path / "quantized" / "model.safetensors", {"format": "pt"})
    config = json.loads((mixture / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    same_as_loaded(read_back(tmp_path / "quantized"), mixture)
