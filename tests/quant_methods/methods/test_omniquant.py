"""OmniQuant: what it learns lowers the block's error, folds away, and is what the step after it rounds to."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kv_cache.errors import ParetoError
from quant_methods.block_solver import BlockSolver
from quant_methods.calibration.calibrator import Decoder, clone
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.compress import compress
from quant_methods.formats.grid import dequantize, expand, fit, round_to_grid
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.omniquant import OmniQuant, _Clipping, _prepare, learn
from quant_methods.methods.rtn import RTN
from quant_methods.methods.scaling import ScaledBlock
from quant_methods.methods.squeezellm import SqueezeLLM
from quant_methods.plan import make_plan
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import RoundStep, Step

CALIBRATION = Calibration(num_samples=6, length=32, seed=3)
W3 = RTN(bits=3, group_size=64, symmetric=False)
LEARN = OmniQuant(epochs=6, batch=2, clipping_rate=0.05, scaling_rate=0.02)


def recipe(*steps: Step) -> Recipe:
    return Recipe("test", steps=steps, calibration=CALIBRATION, kv_scales=False)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_layer_s_strengths_are_equation_2(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 128)
    layer = _Clipping(weight, RTN(bits=4, group_size=32, symmetric=symmetric), torch.float32, rounding=False)
    with torch.no_grad():
        for logits in layer.logits:
            logits.copy_(torch.randn_like(logits))
    grouped = weight.reshape(6, 4, 32)
    strength = [torch.sigmoid(logits) for logits in layer.logits]
    scale, zero = layer.ranges(weight)
    if symmetric:
        assert torch.allclose(scale.abs(), strength[0] * grouped.abs().amax(-1) / 7)
    else:
        low, high = strength[0] * grouped.amin(-1), strength[1] * grouped.amax(-1)
        assert torch.allclose(scale, (high - low) / 15)
        assert torch.allclose(zero, (-8 - low / scale).round().clamp(-8, 7))
    codes = round_to_grid(weight, expand(scale, 128), expand(zero, 128), layer.grid)
    assert torch.allclose(layer(weight), dequantize(codes, scale, zero), atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_starts_from_the_ranges_of_least_error(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 256)
    step = RTN(bits=4, group_size=64, symmetric=symmetric)
    layer = _Clipping(weight, step, torch.bfloat16, rounding=True)
    scale, zero = fit(weight, step.grid, search="mse")
    codes = round_to_grid(weight, expand(scale, 256), expand(zero, 256), step.grid)
    searched = (dequantize(codes, scale, zero) - weight).square().mean()
    found = (layer(weight) - weight).square().mean()
    # Ranges that reach beyond the weights are cut to where a sigmoid has a slope.
    assert found < 1.06 * searched


def test_the_gradient_is_that_of_learned_steps() -> None:
    # LSQ (Esser et al., 2020), Eq. 3: d read / d scale = code - weight / scale inside the range, and the end beyond it.
    weight = torch.tensor([[0.3, -1.0, 0.61, 0.9]])
    layer = _Clipping(weight, RTN(bits=3, group_size=-1, symmetric=True), torch.float32, rounding=False)
    layer.sign.fill_(1)
    with torch.no_grad():
        layer.logits[0].fill_(0.0)  # strength 1/2: scale 1/6
    read = layer(weight)
    assert torch.allclose(read, torch.tensor([[2.0, -4.0, 3.0, 3.0]]) / 6)
    (gradient,) = torch.autograd.grad(read.sum(), layer.logits[0])
    # strength (1 - strength) of a sigmoid, times largest / 3
    assert torch.allclose(gradient, torch.tensor(((2 - 1.8) - 4 + 3 + 3) * 0.25 / 3))


def block_error(decoder: Decoder, block: nn.Module, original: nn.Module, hidden: torch.Tensor) -> float:
    return (decoder.run(1, block, hidden) - decoder.run(1, original, hidden)).square().mean().item()


def plant(block: nn.Module) -> None:
    """Make the attention's input channels differ in size, and its weights in the opposite way."""
    factor = torch.exp(torch.randn(128, generator=torch.Generator().manual_seed(7)))
    block.input_layernorm.weight.data *= factor
    for name in ("q_proj", "k_proj", "v_proj"):
        block.get_submodule(f"self_attn.{name}").weight.data /= factor


def quantized(model: Path, *steps: Step, weight_step: RoundStep = W3, planted: bool = False) -> float:
    """Return the error of one block's output after these steps."""
    decoder = Decoder(model, Source(model))
    plan = make_plan(decoder, recipe(*steps, weight_step), model)
    solver = BlockSolver(decoder, plan, lambda what: None)
    torch.manual_seed(1)
    hidden = decoder.embed(torch.randint(2, 8192, (8, 40)))
    local = list(decoder.linears(1))
    with decoder.loaded(1) as block, torch.no_grad():
        if planted:
            plant(block)
        original = clone(block)
        with torch.enable_grad():
            solver.transform(1, block, hidden, original=(original, hidden))
        solver.quantize(1, block, local, hidden, original=(original, hidden))
        return block_error(decoder, block, original, hidden)


def test_each_part_lowers_the_block_s_error(tiny_model: Path) -> None:
    paper = dataclasses.replace(LEARN, rounding=False, scaling_rate=0.05)
    plain = quantized(tiny_model, planted=True)
    clipping = quantized(tiny_model, dataclasses.replace(paper, scaling_rate=0.0), planted=True)
    both = quantized(tiny_model, paper, planted=True)
    rounding = quantized(tiny_model, dataclasses.replace(paper, rounding=True, epochs=12), planted=True)
    assert clipping < 0.97 * plain
    assert both < 0.93 * clipping
    assert rounding < 0.75 * plain


def test_learned_ranges_go_with_gptq(tiny_model: Path) -> None:
    step = GPTQ(bits=3, group_size=64, symmetric=False, upstream=False)
    learned = quantized(tiny_model, dataclasses.replace(LEARN, rounding=False), weight_step=step)
    assert learned < quantized(tiny_model, weight_step=step)


def test_what_is_learned_is_what_is_rounded_to(tiny_model: Path) -> None:
    decoder = Decoder(tiny_model, Source(tiny_model))
    given = dataclasses.replace(LEARN, epochs=12)
    plan = make_plan(decoder, recipe(given, W3), tiny_model)
    hidden = decoder.embed(torch.randint(2, 8192, (8, 40)))
    with decoder.loaded(1) as block:
        plant(block)
        original = clone(block)
        scaled = ScaledBlock(decoder, 1, block, hidden, plan, (original, hidden))
        learn(given, scaled)
        assert len(scaled.folds) == 3
        assert not torch.equal(block.input_layernorm.weight, original.input_layernorm.weight)
        before = decoder.run(1, original, hidden)
        assert torch.allclose(decoder.run(1, block, hidden), before, atol=1e-3 * before.abs().max().item())
        for learned in scaled.learned.values():
            scale, _ = learned.ranges
            assert torch.equal(scale, scale.bfloat16().float())
            assert learned.offset is not None
            offset = learned.offset / expand(scale, learned.offset.shape[1])
            assert 0.01 < offset.abs().max() <= 0.5 + 1e-6
        assert set(scaled.learned) == set(decoder.linears(1))


def test_training_that_ends_worse_is_dropped(tiny_model: Path) -> None:
    decoder = Decoder(tiny_model, Source(tiny_model))
    wild = OmniQuant(epochs=1, batch=1, clipping_rate=50.0, scaling_rate=3.0, rounding=False)
    plan = make_plan(decoder, recipe(wild, W3), tiny_model)
    hidden = decoder.embed(torch.randint(2, 8192, (4, 40)))
    with decoder.loaded(1) as block:
        original = clone(block)
        scaled = ScaledBlock(decoder, 1, block, hidden, plan)
        start = _prepare(wild, scaled).clipping["mlp/up_proj"]
        learn(wild, scaled)
        assert torch.equal(block.input_layernorm.weight, original.input_layernorm.weight)
        assert torch.equal(scaled.learned["mlp.up_proj"].ranges[0], start.ranges(original.mlp.up_proj.weight)[0])


def test_interrupted_runs_write_the_same_bytes(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    given = recipe(dataclasses.replace(LEARN, epochs=1), dataclasses.replace(W3, bits=4))

    def stop(done: int, total: int, what: str) -> None:
        if done == 1 and "omniquant" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_model, given, tmp_path / "out", text=text_file, progress=stop)
    report = compress(tiny_model, given, tmp_path / "out", text=text_file)
    assert report.resumed_blocks == 1
    compress(tiny_model, given, tmp_path / "fresh", text=text_file)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh")]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((LEARN, SqueezeLLM()), "omniquant learns ranges, and squeezellm has none; use rtn or gptq"),
        ((LEARN, RTN(bits=4, group_size=-1, per_tensor=True)), "omniquant learns a range for every group of every row"),
        ((LEARN, GPTQ(group_size=64)), "only rtn without outliers and rank .* instead of gptq, or rounding: false"),
    ],
)
def test_steps_that_cannot_follow_are_refused(
    tiny_model: Path, tmp_path: Path, steps: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ParetoError, match=message):
        compress(tiny_model, recipe(*steps), tmp_path / "out")


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"batch": 0}, {"clipping_rate": -1.0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ParetoError, match="omniquant"):
        OmniQuant(**settings).check()
