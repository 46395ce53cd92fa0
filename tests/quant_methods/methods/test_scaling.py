"""Transform steps: a block computes what it did, and rounds better."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.stages import Stage, find_stages, statistics_at_once
from quant_methods.checkpoints.checkpoint import Source, write_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.formats.grid import nearest, round_tokens
from quant_methods.handlers import ScalingProblem
from quant_methods.methods import awq, scaling
from quant_methods.methods.awq import AWQ
from quant_methods.methods.awq import scale as awq_scale
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.rtn import RTN
from quant_methods.methods.scaling import Fold, ScaledBlock, divide, find_folds, scale_block, weight_offset
from quant_methods.methods.smoothquant import SmoothQuant, smooth
from quant_methods.methods.smoothquant import scale as smoothquant_scale
from quant_methods.plan import make_plan
from quant_methods.recipe import Calibration, Recipe
from quant_methods.recipe_file import parse_recipe
from quant_methods.steps import Step

W4 = RTN(bits=4, group_size=64, symmetric=False)
W8A8 = RTN(bits=8, group_size=-1, symmetric=True, activations="int8")
CALIBRATION = Calibration(num_samples=6, length=32, seed=3)


def recipe(*steps: Step, ignore: tuple[str, ...] = ("lm_head",)) -> Recipe:
    return Recipe("test", steps=steps, calibration=CALIBRATION, kv_scales=False, ignore=ignore)


def problem(step: RTN, *, channels: int = 128, outliers: int = 3) -> ScalingProblem:
    """Two layers whose shared input has a few channels a hundred times as large as the others."""
    inputs = torch.randn(600, channels)
    inputs[:, torch.randperm(channels)[:outliers]] *= 100
    weights = [torch.randn(48, channels), torch.randn(16, channels)]
    hessian = inputs.T @ inputs / len(inputs)
    return ScalingProblem(weights, [step, step], hessian, inputs.abs().amax(0), inputs.abs().mean(0), inputs[::2])


def output_error(given: ScalingProblem, s: Tensor, activations: bool) -> float:
    total = 0.0
    for weight, step in zip(given.weights, given.steps, strict=True):
        assert step is not None
        inputs = round_tokens(given.sample / s, 8) if activations else given.sample / s
        total += (inputs @ nearest(weight * s, step.grid).T - given.sample @ weight.T).square().sum().item()
    return total


@pytest.mark.parametrize("transform", [AWQ(), SmoothQuant(alpha=0.7), SmoothQuant()], ids=str)
@torch.no_grad()
def test_a_scaled_block_computes_what_it_did(tiny_model: Path, transform: Step) -> None:
    decoder = Decoder(tiny_model, Source(tiny_model))
    plan = make_plan(decoder, recipe(transform, W4, ignore=("lm_head", "up_proj", "gate_proj")), tiny_model)
    hidden = decoder.embed(torch.randint(2, 8192, (4, 40)))
    with decoder.loaded(1) as block:
        before = decoder.run(1, block, hidden)
        weights = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        tensors = scale_block(ScaledBlock(decoder, 1, block, hidden, plan))
        after = decoder.run(1, block, hidden)
        changed = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, weights[name])}
        now = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    # up_proj is not quantized: it is stored in bfloat16 once more.
    assert (after - before).abs().max() < 2e-2 * before.abs().max()
    moved = {"input_layernorm.weight", "self_attn.q_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight"}
    assert moved <= changed or transform == SmoothQuant(), "a search may find that no scales are best"
    assert "self_attn.o_proj.weight" not in changed, "two heads share one value: no scales can move into v_proj"
    assert set(tensors) == {f"model.layers.1.{n}" for n in ("input_layernorm.weight", "mlp.up_proj.weight")}
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), now[name.removeprefix("model.layers.1.")])


@torch.no_grad()
def test_folds_are_found_by_watching(tiny_model: Path) -> None:
    decoder = Decoder(tiny_model, Source(tiny_model))
    hidden = decoder.embed(torch.randint(2, 8192, (4, 40)))
    with decoder.loaded(0) as block:
        folds = find_folds(decoder, 0, block, hidden, find_stages(decoder, 0, block, hidden))
    assert [(fold.stage.names[0], fold.producer) for fold in folds] == [
        ("self_attn.q_proj", "input_layernorm"),
        ("mlp.gate_proj", "post_attention_layernorm"),
        ("mlp.down_proj", "mlp.up_proj"),
    ]


def test_a_norms_rounding_is_made_up_for() -> None:
    norm, weight = nn.RMSNorm(64), torch.randn(8, 64)
    norm.weight.data = (torch.rand(64) + 0.5).bfloat16().float()
    norm.weight.data[3] = 0
    inputs = torch.randn(10, 64)
    with torch.no_grad():
        before = norm(inputs) @ weight.T
        divide(norm, [weight], torch.rand(64) * 7 + 0.1, torch.bfloat16)
        assert torch.equal(norm.weight, norm.weight.bfloat16().float())
        assert torch.allclose(norm(inputs) @ weight.T, before, rtol=1e-4, atol=1e-4)


class OnePlus(nn.Module):
    """A norm as Gemma has it: it multiplies by 1 + its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize("norm", [OnePlus, lambda: nn.RMSNorm(64), lambda: nn.LayerNorm(64)])
def test_norms_are_divided_whatever_they_add_to_their_weight(norm: Callable[[], nn.Module]) -> None:
    module, x, weight, s = norm(), torch.randn(10, 64), torch.randn(8, 64), torch.rand(64) * 3 + 0.3
    fold = Fold(0, Stage(("a",), False), "norm", weight_offset(module))
    assert fold.offset == isinstance(module, OnePlus)
    with torch.no_grad():
        before = module(x)
        changed = {"weight": fold.divided(module.weight, s)}
        assert torch.allclose(torch.func.functional_call(module, changed, x), before / s, atol=1e-5)
        before = before @ weight.T
        divide(module, [weight], s, torch.float32, fold.offset)
        assert torch.allclose(module(x) @ weight.T, before, rtol=1e-4, atol=1e-4)


def test_smoothquant_is_the_papers_equation() -> None:
    given = problem(W8A8)
    largest = torch.cat(given.weights).abs().amax(0)
    assert torch.allclose(smooth(given, 0.3), given.largest**0.3 / largest**0.7)
    even = smooth(given, 0.5)
    # At 0.5 inputs and weights have the same ranges, channel by channel.
    assert torch.allclose(given.largest / even, largest * even, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, None])
def test_smoothquant_makes_outliers_harmless(alpha: float | None) -> None:
    given = problem(W8A8)
    naive = output_error(given, torch.ones(128), True)
    found = output_error(given, smoothquant_scale(SmoothQuant(alpha=alpha), given), True)
    assert found < 0.2 * naive
    if alpha is None:
        assert found <= output_error(given, smooth(given, 0.5), True)


def test_awq_never_loses_to_no_scales() -> None:
    given = problem(W4)
    naive = output_error(given, torch.ones(128), False)
    assert output_error(given, awq_scale(AWQ(), given), False) < 0.7 * naive
    flat = problem(W4, outliers=0)
    assert output_error(flat, awq_scale(AWQ(), flat), False) <= output_error(flat, torch.ones(128), False) * 1.02


@pytest.mark.parametrize("outliers", [0, 3, 12])
def test_awq_finds_the_best_of_all_scales_and_looks_at_few_in_full(
    monkeypatch: pytest.MonkeyPatch, outliers: int
) -> None:
    given = problem(W4, outliers=outliers)
    rows: list[int] = []
    error = awq._error

    def counted(hessian: Tensor, pairs: awq.Pairs, s: Tensor) -> float:
        rows.append(sum(len(weight) for weight, _ in pairs))
        return error(hessian, pairs, s)

    monkeypatch.setattr(awq, "_error", counted)
    found = output_error(given, awq_scale(AWQ(), given), False)
    assert sorted(rows) == [8] * 40 + [64] * (1 + awq.FINALISTS)
    monkeypatch.setattr(awq, "FINALISTS", 40)
    rows.clear()
    assert found == pytest.approx(output_error(given, awq_scale(AWQ(), given), False), rel=0.03)
    assert rows == [64] * 41


@torch.no_grad()
def test_awq_looks_at_as_many_tokens_as_it_needs_and_smoothquant_at_all(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    decoder = Decoder(tiny_model, Source(tiny_model))
    hidden = decoder.embed(torch.randint(2, 8192, (12, 40)))
    seen = []

    def watched(decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, **which: Any) -> object:
        seen.append(hidden)
        return statistics_at_once(decoder, index, block, hidden, **which)

    monkeypatch.setattr(scaling, "statistics_at_once", watched)
    monkeypatch.setattr(AWQ, "tokens", 160)
    for step, sequences in ((AWQ(exponents=2), hidden[::3]), (SmoothQuant(alpha=0.5), hidden)):
        with decoder.loaded(1) as block:
            scale_block(ScaledBlock(decoder, 1, block, hidden, make_plan(decoder, recipe(step, W4), tiny_model)))
        assert torch.equal(seen.pop(), sequences)
    # A calibration set smaller than that is looked at whole.
    monkeypatch.setattr(AWQ, "tokens", 1000)
    with decoder.loaded(1) as block:
        scale_block(ScaledBlock(decoder, 1, block, hidden, make_plan(decoder, recipe(AWQ(), W4), tiny_model)))
    assert torch.equal(seen.pop(), hidden)


def test_channels_that_are_never_used_keep_finite_scales() -> None:
    given = problem(W8A8)
    for tensor in (given.largest, given.mean, given.hessian[5], given.hessian[:, 5]):
        tensor[5 if tensor.dim() == 1 and len(tensor) == 128 and tensor is not given.hessian[5] else slice(None)] = 0
    given.sample[:, 5] = 0
    for s in (smooth(given, 0.5), smoothquant_scale(SmoothQuant(), given), awq_scale(AWQ(), given)):
        assert torch.isfinite(s).all()
        assert (s > 0).all()


@pytest.mark.parametrize("weights", [W4, GPTQ(bits=4, group_size=64, symmetric=False)], ids=["rtn", "gptq"])
def test_an_interrupted_run_writes_the_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path, weights: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant_methods import run

    steps = recipe(AWQ(exponents=4), weights)
    compress(tiny_model, steps, tmp_path / "whole", text=text_file)
    original, calls = run.write_tensors, []

    def interrupted(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_model, steps, tmp_path / "resumed", text=text_file)
    monkeypatch.setattr(run, "write_tensors", original)
    report = compress(tiny_model, steps, tmp_path / "resumed", text=text_file)
    assert report.resumed_blocks == 2
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
    names = set(Source(tmp_path / "whole").entries)
    assert "model.layers.0.input_layernorm.weight" in names
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"


def test_the_reference_reads_back_scaled_norms_and_rounded_activations(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    compress(tiny_model, recipe(SmoothQuant(), W8A8), tmp_path / "w8a8", text=text_file)
    compress(tiny_model, recipe(SmoothQuant(alpha=0.5), RTN(bits=8, group_size=64)), tmp_path / "w8", text=text_file)
    tokens = torch.randint(2, 8192, (2, 50))
    with torch.no_grad():
        original, w8a8, w8 = (
            load_reference(path)(tokens).logits.log_softmax(-1)
            for path in (tiny_model, tmp_path / "w8a8", tmp_path / "w8")
        )
    scale = (original - original.mean(-1, keepdim=True)).std()
    assert 0 < (w8 - original).std() < 0.05 * scale
    assert (w8 - original).std() < (w8a8 - original).std() < 0.1 * scale


def test_the_reference_refuses_a_checkpoint_that_lacks_a_layer(tiny_model: Path, tmp_path: Path) -> None:
    source = Source(tiny_model)
    lacking = "model.layers.1.mlp.up_proj.weight"
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    write_tensors(tmp_path / "model.safetensors", {n: source.read(n) for n in source.entries if n != lacking}, {})
    with pytest.raises(ParetoError, match=f"the checkpoint lacks {lacking}"):
        load_reference(tmp_path)


def test_a_transform_without_a_weight_step_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ParetoError, match="awq prepares weights for a step that rounds them"):
        compress(tiny_model, recipe(AWQ()), tmp_path / "out")
    with pytest.raises(ParetoError, match=r"alpha: 1.5 is not in \[0, 1\]"):
        parse_recipe({"steps": [{"method": "smoothquant", "alpha": 1.5}]})
