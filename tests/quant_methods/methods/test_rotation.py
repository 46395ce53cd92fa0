"""Rotation of the residual stream: the same function, without outlier channels."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.rotation import Rotate, RotatedSource, hadamard, rotation
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import Step

W4 = RTN(bits=4, group_size=64, symmetric=False)


def recipe(*steps: Step, **changes: tuple[str, ...]) -> Recipe:
    return Recipe("test", steps=steps, calibration=Calibration(6, 32, 3), kv_scales=False, **changes)


@pytest.mark.parametrize("size", [1, 2, 12, 96, 128, 320])
def test_a_hadamard_matrix_is_orthogonal_and_spreads(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    power = size & -size
    if power == size:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize("size", [96, 128, 2560])
def test_a_rotation_for_layer_norms_leaves_the_mean_alone(size: int) -> None:
    turn = rotation(size, 3, centred=True)
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(turn.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-10)
    # Every channel is still spread: no number is far above what the equal ones of a Hadamard matrix are.
    assert turn.abs().max() < {96: 0.75, 128: 0.5, 2560: 0.15}[size]
    x = torch.randn(5, size, dtype=torch.float64) + 3
    norm = nn.LayerNorm(size, dtype=torch.float64)
    assert torch.allclose(norm(x) @ turn, norm(x @ turn), atol=1e-10)


@torch.no_grad()
def test_blocks_compute_the_same_in_another_basis(tiny_model: Path) -> None:
    tokens = torch.randint(2, 8192, (3, 30))
    plain = Source(tiny_model)
    rotated = RotatedSource(Rotate(seed=1), plain)
    states = []
    for source in (plain, rotated):
        decoder = Decoder(tiny_model, source)
        hidden = decoder.embed(tokens)
        for index in range(3):
            with decoder.loaded(index) as block:
                decoder.advance(index, block, hidden)
        states.append(hidden)
    norm = plain.read("model.norm.weight").float()
    head = plain.read("model.embed_tokens.weight").float()

    def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return hidden / hidden.square().mean(-1, keepdim=True).sqrt() @ weight.T

    assert not torch.allclose(*states, atol=0.1)
    expected = logits(states[0], head * norm)
    assert torch.allclose(
        logits(states[1], rotated.read("lm_head.weight")), expected, atol=1e-3 * expected.abs().max().item()
    )


@pytest.mark.parametrize("weights", [W4, GPTQ(bits=4, group_size=64, symmetric=False)], ids=["rtn", "gptq"])
def test_a_rotated_checkpoint_serves_the_original_function(
    tiny_model: Path, text_file: Path, tmp_path: Path, weights: Step
) -> None:
    eight = RTN(bits=8, group_size=64)
    compress(tiny_model, recipe(Rotate(), eight), tmp_path / "w8", text=text_file)
    compress(tiny_model, recipe(Rotate(), weights, ignore=("lm_head", "down_proj")), tmp_path / "w4", text=text_file)
    config = json.loads((tmp_path / "w4" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" in config["quantization_config"]["ignore"]
    assert "lm_head.weight" in Source(tmp_path / "w4").entries
    tokens = torch.randint(2, 8192, (2, 50))
    with torch.no_grad():
        original, w8, w4 = (
            load_reference(path)(tokens).logits for path in (tiny_model, tmp_path / "w8", tmp_path / "w4")
        )
    assert (w8 - original).std() < 0.06 * original.std()
    # Sixteen times coarser, but for down_proj; a wrong basis would leave nothing of the original (1.4).
    assert (w8 - original).std() < (w4 - original).std() < original.std()


def test_models_that_are_not_like_llama_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = Source(tiny_model)
    block = nn.Module()
    block.input_layernorm = nn.LayerNorm(128)
    config = type("Config", (), {"hidden_size": 128})
    with pytest.raises(ParetoError, match="LayerNorm is not a plain RMS norm"):
        RotatedSource(Rotate(), source).check_block(block, config)
    source.entries["model.layers.0.mlp.experts.w1"] = source.entries["model.norm.weight"]
    with pytest.raises(ParetoError, match=r"does not know what model.layers.0.mlp.experts.w1 is"):
        RotatedSource(Rotate(), source)


def test_rotation_comes_first_and_before_a_weight_step(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ParetoError, match="rotate comes once, and first"):
        compress(tiny_model, recipe(W4, Rotate()), tmp_path / "out")
    with pytest.raises(ParetoError, match="rotate prepares weights for a step that rounds them"):
        compress(tiny_model, recipe(Rotate()), tmp_path / "out")
