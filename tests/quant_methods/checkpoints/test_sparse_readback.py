"""Other people's sparse checkpoints read back as the dense model that they mean."""

import json
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.reference import load_reference
from quant_methods.model_source import validate_checkpoint
from tests.quant_methods.checkpoints.test_readback import LAYER, read_back
from tests.quant_methods.checkpoints.test_stored_layers import write
from tests.quant_methods.sparse_writer import bitmask_24, kept, write_sparse


@pytest.mark.parametrize("kind", ["bitmask", "bitmask-24", "marlin-4", "marlin-8", "int-24"])
def test_sparse_checkpoints_read_back(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    sparse, dense = write_sparse(tiny_model, tmp_path, kind)
    expected, found = load_reference(dense).state_dict(), load_reference(sparse).state_dict()
    parameters = read_back(sparse)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        # Codes times scales are float32; the dense model was rounded to the model's 16 bits.
        close = {"rtol": 2**-7, "atol": 0.0} if kind in ("marlin-4", "marlin-8", "int-24") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[name], weight, **close)
        if name in parameters:
            torch.testing.assert_close(parameters.read(name).float(), weight, **close)
    assert set(expected) - set(parameters.parameters) <= {"lm_head.weight"}


def test_float8_beside_a_bitmask_is_read(tiny_model: Path, tmp_path: Path) -> None:
    codes = torch.randn(192, 128, generator=torch.Generator().manual_seed(0))
    codes, scale = (codes * kept(codes)).to(torch.float8_e4m3fn), torch.rand(192, 1) + 0.5
    tensors = bitmask_24(codes.float()) | {"weight_scale": scale}
    tensors["compressed"] = tensors["compressed"].to(torch.float8_e4m3fn)
    group = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}, "input_activations": None}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "sparsity_config": sparsity}
    out = write(tiny_model, tmp_path / "float8", tensors, settings)
    assert torch.equal(read_back(out).read(f"{LAYER}.weight"), codes.float() * scale)


def test_what_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    sparse, _ = write_sparse(tiny_model, tmp_path, "bitmask")
    with pytest.raises(ParetoError, match=r"stores sparse weights \(sparse-bitmask\), which are served"):
        validate_checkpoint(sparse)
    config = json.loads((sparse / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["format"] = "sparse-48"
    (sparse / "config.json").write_text(json.dumps(config))
    with pytest.raises(ParetoError, match="format 'sparse-48'; expected dense, sparse-24-bitmask"):
        load_reference(sparse)
