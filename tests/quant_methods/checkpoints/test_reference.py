"""The reference model of a checkpoint in the format of ours computes what the format says, and refuses the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import read_tensors, write_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.formats.grid import round_tokens
from quant_methods.formats.native_format import NativeConfig, local_tensors, unpack
from quant_methods.recipe import Recipe
from tests.quant_methods.random_layers import Parts

STEPS = (
    Parts(bits=8, group_size=-1, columns=3, activations="int8", targets=("model.layers.0.*",)),
    Parts(bits=4, group_size=32, columns=2, sparse=True, product=2, activations="int6", targets=("model.layers.1.*",)),
    Parts(bits=3, group_size=-1, table=True, sparse=True, targets=("model.layers.2.*",)),
)


@pytest.fixture
def ours(tiny_model: Path, tmp_path: Path, parts_handled: None) -> Path:
    compress(tiny_model, Recipe("parts", steps=STEPS, kv_scales=False), tmp_path / "ours")
    return tmp_path / "ours"


def test_layers_compute_what_the_format_says(ours: Path) -> None:
    model = load_reference(ours)
    tensors, _ = read_tensors(ours / "model.safetensors")
    forms = NativeConfig.parse(json.loads((ours / "config.json").read_text())["quantization_config"]).forms
    assert len(forms) == 21
    for block, bits in enumerate((8, 6, None)):
        name = f"model.layers.{block}.mlp.down_proj"
        linear = unpack(name, local_tensors(name, tensors), forms[name])
        x = torch.randn(5, 192) * 10 ** torch.randn(192)
        inner = x.clone()
        if (apart := linear.apart()) is not None:
            inner[:, apart] = 0
        rounded = inner if bits is None else round_tokens(inner, bits)
        wanted = rounded @ linear.read_bulk().T + x @ (linear.read() - linear.read_bulk()).T
        assert torch.allclose(model.get_submodule(name)(x), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())


def test_what_it_cannot_read_is_one_line(ours: Path, tmp_path: Path) -> None:
    def changed(name: str) -> Path:
        shutil.copytree(ours, tmp_path / name)
        return tmp_path / name

    tensors, metadata = read_tensors(ours / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.sparse_columns"
    path = changed("lost")
    write_tensors(path / "model.safetensors", {n: t for n, t in tensors.items() if n != lost}, metadata)
    with pytest.raises(ParetoError, match=f"the checkpoint lacks {lost}"):
        load_reference(path)
    for name, change, message in [
        ("newer", {"version": 3}, "version 3 of the format; this vllm-pareto reads versions 1 and 2"),
        (
            "foreign",
            {"quant_method": "mxfp4"},
            "quantized by 'mxfp4'; expected compressed-tensors, pareto, gptq, awq, or no",
        ),
    ]:
        path = changed(name)
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] |= change
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ParetoError, match=message):
            load_reference(path)
    path = changed("more")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["groups"][0]["targets"].append("model.layers.9.mlp.up_proj")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ParetoError, match=r"the model has no linear layer model\.layers\.9\.mlp\.up_proj"):
        load_reference(path)
