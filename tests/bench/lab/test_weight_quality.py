"""Comparing checkpoints in PyTorch, and planting outliers, on a model of two blocks."""

import json

import pytest
import torch

from bench.lab import plant_outliers, weight_quality
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.embedded import MODELS
from quant_methods.methods.rtn import RTN
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.recipe import Calibration, Recipe

MODEL = MODELS / "ref-7m"
W8A8 = RTN(bits=8, group_size=-1, symmetric=True, activations="int8")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "planted"
    assert plant_outliers.main([str(MODEL), str(out), "--factor", "256", "--channels", "4"]) == 0
    return out


@torch.no_grad()
def test_planted_outliers_change_nothing_but_activations(planted):
    tokens = torch.randint(2, 8192, (2, 60))
    sizes = []
    for folder in (MODEL, planted):
        model = load_reference(folder)
        seen = []
        model.get_submodule("model.layers.1.mlp.up_proj").register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
        sizes.append((model(tokens).logits, seen[0].abs().amax((0, 1))))
    (plain, small), (same, large) = sizes
    assert torch.allclose(plain, same, rtol=1e-3, atol=1e-3)
    assert sorted((large / small).round().int().tolist())[-5:] == [1, 256, 256, 256, 256]


def test_smoothquant_survives_outliers_that_rounding_does_not(planted, tmp_path, capsys):
    for name, steps in (("naive", (W8A8,)), ("smooth", (SmoothQuant(), W8A8))):
        recipe = Recipe(name, steps=steps, calibration=Calibration(4, 64), kv_scales=False)
        compress(planted, recipe, tmp_path / name)
    flags = ["--num-windows", "2", "--window-tokens", "128", "--out", str(tmp_path / "q.json")]
    assert weight_quality.main([str(planted), str(tmp_path / "naive"), str(tmp_path / "smooth"), *flags]) == 0
    document = json.loads((tmp_path / "q.json").read_text())
    original, naive, smooth = document["rows"]
    assert original["kl"]["value"] == 0
    assert original["top1_agreement"]["value"] == 1
    assert 0 < smooth["kl"]["value"] < 0.1 * naive["kl"]["value"]
    assert smooth["bits"] == pytest.approx(8 + 16 * (1 / 256), rel=0.01)
    assert (document["schema"], document["text"]) == ("vllm-pareto/weight-quality/1", "samples")
    assert "| smooth | 8.0" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    assert plant_outliers.main([str(MODEL), str(tmp_path / "out"), "--factor", "3"]) == 2
    assert "--factor 3 is not a power of two" in capsys.readouterr().err
    assert weight_quality.main([str(MODEL), str(tmp_path / "missing"), "--num-windows", "1", "--window-tokens", "8",
                                "--out", str(tmp_path / "q.json")]) == 2  # fmt: skip
    assert "missing: no config.json" in capsys.readouterr().err
