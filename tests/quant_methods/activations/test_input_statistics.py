"""Activation statistics on planted inputs and on a model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_cache.errors import ParetoError
from quant_methods.activations.input_statistics import Criteria, InputStatistics, describe, kurtosis, quantile
from quant_methods.activations.run import statistics
from quant_methods.calibration.stages import Ranges
from quant_methods.methods.rotation import Rotate
from quant_methods.methods.rtn import RTN
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.recipe import Calibration, Recipe

W8A8 = RTN(bits=8, group_size=-1, activations="int8")
RECIPE = Recipe("test", steps=(SmoothQuant(), W8A8), calibration=Calibration(6, 32, 3), kv_scales=False)


def ranges(x: torch.Tensor) -> Ranges:
    return Ranges(x.abs().amax(0), x.abs().mean(0), x)


def test_planted_outliers_are_counted() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 50)
    x[:, :3] *= 40
    x[7, 9] = 6.5
    found = describe("x", ranges(x), Criteria(factor=10))
    assert found.outlier_channels == 3
    assert found.llm_int8_channels == 4
    assert found.largest == x.abs().max().item()
    assert 2.5 < found.median_largest < 5
    # One scale for a token is spent on the outliers: most of a token's other channels round to zero, unlike without.
    plain = describe("x", ranges(x[:, 3:]), Criteria(factor=10))
    assert found.token_zeros > 10 * plain.token_zeros
    assert found.kurtosis > 10 * plain.kurtosis
    assert plain.outlier_channels == 0


def test_uniform_inputs_lose_what_theory_says() -> None:
    torch.manual_seed(0)
    x = torch.rand(4000, 64) * 2 - 1
    found = describe("x", ranges(x), Criteria(percentile=100))
    # Steps of 1/127; a uniform rounding error's root mean square is step/sqrt(12), that of x 1/sqrt(3).
    assert found.token_error == pytest.approx(1 / 127 / 2, rel=0.03)
    assert found.static_error == pytest.approx(1 / 127 / 2, rel=0.03)
    # The distribution's: 9/5. Values within half a step of zero round to it.
    assert found.kurtosis == pytest.approx(1.8, abs=0.01)
    assert found.static_zeros == pytest.approx(0.5 / 127, rel=0.1)
    assert found.static_saturated < 1e-4


def test_static_scales_clip_what_lies_above_the_percentile() -> None:
    torch.manual_seed(0)
    found = describe("x", ranges(torch.rand(8000, 64)), Criteria(percentile=98))
    assert found.static_saturated == pytest.approx(0.02, rel=0.05)
    assert found.percentile == pytest.approx(0.98, rel=0.01)


def test_kurtosis_and_quantile_are_the_textbook_ones() -> None:
    torch.manual_seed(0)
    assert kurtosis(torch.randn(1_000_000)) == pytest.approx(3, abs=0.05)
    assert kurtosis(torch.tensor([1.0, 1, 1, 5])) == pytest.approx(((3 * 1 + 81) / 4) / (((3 * 1 + 9) / 4) ** 2))
    assert kurtosis(torch.ones(5)) == 0
    values = torch.arange(1.0, 11)
    assert [quantile(values, f) for f in (0, 0.1, 0.11, 0.5, 1)] == [1, 1, 2, 5, 10]


@pytest.fixture(scope="module")
def planted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 5 channels of one norm 64 times as large, its function unchanged."""
    folder = tmp_path_factory.mktemp("models") / "planted"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1."
    tensors[f"{prefix}post_attention_layernorm.weight"][10:15] *= 64
    for name in ("gate_proj", "up_proj"):
        tensors[f"{prefix}mlp.{name}.weight"][:, 10:15] /= 64
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_name(rows: list[InputStatistics] | None) -> dict[str, InputStatistics]:
    assert rows is not None
    return {row.name.removeprefix("model.layers."): row for row in rows}


def test_smoothing_and_rotation_take_outliers_away(planted: Path, text_file: Path, tmp_path: Path) -> None:
    before, after = map(by_name, statistics(planted, RECIPE, tmp_path / "smooth", sequences=4, text=text_file))
    stage = "1.mlp.{gate_proj,up_proj}"
    assert list(before) == [
        f"{block}.{part}"
        for block in range(3)
        for part in ("self_attn.{q_proj,k_proj,v_proj}", "self_attn.o_proj", "mlp.{gate_proj,up_proj}", "mlp.down_proj")
    ]
    assert (before[stage].outlier_channels, before[stage].channels) == (5, 128)
    assert after[stage].outlier_channels == 0
    assert after[stage].token_error < 0.4 * before[stage].token_error
    assert after[stage].token_zeros < 0.1 * before[stage].token_zeros
    assert before["0.mlp.down_proj"].outlier_channels == 0
    rotated = dataclasses.replace(RECIPE, steps=(Rotate(), W8A8))
    _, turned = map(by_name, statistics(planted, rotated, tmp_path / "turned", sequences=4, text=text_file))
    assert turned[stage].outlier_channels == 0
    assert turned[stage].kurtosis < 0.2 * before[stage].kurtosis

    data = json.loads((tmp_path / "smooth" / "activation_statistics.json").read_text())
    assert data["before"][6]["outlier_channels"] == 5
    table = (tmp_path / "smooth" / "activation_statistics.md").read_text()
    assert "5 -> 0" in next(line for line in table.splitlines() if stage in line)
    assert (tmp_path / "smooth" / "activation_statistics.png").read_bytes().startswith(b"\x89PNG")


def test_without_preparing_steps_there_is_no_after(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(RECIPE, steps=(W8A8,))
    before, after = statistics(tiny_model, plain, tmp_path / "out", sequences=2, text=text_file)
    assert after is None
    assert "->" not in (tmp_path / "out" / "activation_statistics.md").read_text()
    with pytest.raises(ParetoError, match="out exists; give --overwrite"):
        statistics(tiny_model, plain, tmp_path / "out", sequences=2, text=text_file)
    again, _ = statistics(tiny_model, plain, tmp_path / "out", sequences=2, text=text_file, overwrite=True)
    assert again == before
