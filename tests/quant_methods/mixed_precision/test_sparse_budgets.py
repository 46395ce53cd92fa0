"""Budgets of recipes that prune: where zeros go, by measured losses and by outliers, and what that takes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.reference import load_reference
from quant_methods.methods.pruning import Magnitude, Wanda
from quant_methods.methods.rtn import RTN
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.mixed_precision import owl
from quant_methods.mixed_precision.budget import Budget, Loss
from quant_methods.mixed_precision.mixed import JSON_FILE, compress_to_budget
from quant_methods.mixed_precision.sensitivity import Settings
from quant_methods.mixed_precision.units import Width
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import Step
from quant_methods.training.movement import Movement
from quant_methods.training.recovery import Recover

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(kl_sequences=1, hessian_sequences=2)
W4 = RTN(bits=4, group_size=64)


def recipe(*steps: Step) -> Recipe:
    return Recipe("test", steps=steps, calibration=Calibration(3, 32, 3), kv_scales=False)


def widths(*names: str) -> Settings:
    return dataclasses.replace(SETTINGS, widths=tuple(map(Width.parse, names)))


def test_widths_with_zeros_are_read_and_counted() -> None:
    assert Width.parse("4g32s52.5") == Width(4, 32, 52.5)
    assert str(Width.parse("16s41.07")) == "16s41.07"
    assert [str(w) for w in sorted(map(Width.parse, ("16", "4", "4s50", "16s60")), key=lambda w: w.rank)] == [
        "4s50", "4", "16s60", "16",
    ]  # fmt: skip
    # Of 100 weights in 4 bits and one scale of 16: a bit each for the place, and those that are left.
    assert Width.parse("4s60").stored(416, 100, 4) == 100 + 40 * 4 + 16
    assert Width.parse("4").stored(416, 100, 4) == 416
    with pytest.raises(ParetoError, match=r"width '4s': expected .* such as 4s50"):
        Width.parse("4s")


@pytest.mark.parametrize("mean", [0.36, 0.5, 0.64])
def test_owl_shares_out_what_was_asked_for(mean: float) -> None:
    ratios, weights = [0.01, 0.05, 0.02, 0.0, 0.09], [10, 20, 30, 0, 40]
    found = owl.sparsities(ratios, weights, mean)
    assert sum(s * w for s, w in zip(found, weights, strict=True)) / 100 == pytest.approx(mean)
    # Linear in the ratio, from end to end by 2 lambda, of the blocks that have weights.
    assert found[0] - found[4] == pytest.approx(0.16)
    assert found[0] - found[1] == pytest.approx(0.16 * 0.04 / 0.08)
    assert owl.sparsities([0.3, 0.3], [1, 2], mean) == pytest.approx([mean, mean])


def test_outliers_are_counted_in_each_block(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    told = []
    report, done = compress_to_budget(
        tiny_model, recipe(Wanda()), Budget.parse("50%"), tmp_path / "out", settings=SETTINGS, loss="owl",
        text=text_file, chosen=told.append,
    )  # fmt: skip
    model, tokens = load_reference(tiny_model), load_sequences(tiny_model, text_file, 3, 32, seed=3)
    names, squares, hooks = {layer.name for layer in report.layers}, {}, []
    for name in names:

        def seen(module: torch.nn.Module, given: tuple[torch.Tensor], out: torch.Tensor, name: str = name) -> None:
            squares[name] = given[0].double().flatten(0, 1).square().sum(0)

        hooks.append(model.get_submodule(name).register_forward_hook(seen))
    with torch.no_grad():
        model(tokens)
    ratios = []
    for index in range(3):
        scores = torch.cat([
            (model.get_submodule(name).weight.double().abs() * squares[name].sqrt()).flatten()
            for name in names if f"layers.{index}." in name
        ])  # fmt: skip
        ratios.append((scores > 5 * scores.mean()).double().mean().item())
    assert len(set(ratios)) == 3
    assert told[0].losses[::4] == pytest.approx(ratios)
    expected = owl.sparsities(ratios, [1, 1, 1], 0.5)
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(expected[int(layer.name.split(".")[2])], abs=0.005)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert {type(step) for step in done.steps} == {Wanda}
    assert json.loads((tmp_path / "out" / JSON_FILE).read_text())["sparsity"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("steps", "budget", "names", "loss"),
    [
        ((Wanda(),), "50%", (), "kl"),
        ((Magnitude(), W4), "45%", ("4", "4s40", "4s70"), "hessian"),
        ((SparseGPT(), W4), "3.6bits", ("3", "4", "4s50", "16s50", "16"), "kl"),
    ],
    ids=["zeros", "zeros with bits", "bits"],
)
def test_budgets_are_kept(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...], budget: str, names: tuple[str, ...],
    loss: Loss,
) -> None:  # fmt: skip
    settings, given = widths(*names) if names else SETTINGS, Budget.parse(budget)
    told = []
    report, done = compress_to_budget(
        tiny_model, recipe(*steps), given, tmp_path / "out", settings=settings, loss=loss, text=text_file,
        chosen=told.append,
    )  # fmt: skip
    (assignment,) = told
    if given.sparsity is not None:
        assert given.sparsity <= assignment.sparsity < given.sparsity + 0.1
        pruned = sum(layer.zeros or 0 for layer in report.layers)
        every = sum(unit.weights for unit in assignment.units)
        assert pruned / every >= assignment.sparsity - 0.002
    else:
        assert given.bits - 0.3 < assignment.bits_per_weight <= given.bits
    both = zip(assignment.units, assignment.chosen, strict=True)
    chosen = {name: Width.parse(choice.width) for unit, choice in both for name in unit.layers}
    zeros = {layer.name: layer.sparsity for layer in report.layers}
    for name, width in chosen.items():
        if width.whole:
            assert name not in zeros
        elif width.percent:
            assert zeros[name] == pytest.approx(width.percent / 100, abs=0.12)
        else:
            assert zeros[name] is None
    assert len(set(chosen.values())) > 1
    # What was chosen is the best: no unit alone can be swapped for one that loses less and takes no more.
    for unit, choice in zip(assignment.units, assignment.chosen, strict=True):
        losses = {c.width: c.error if loss == "hessian" else c.kl for c in unit.choices}
        for other in unit.choices:
            small = (
                Width.parse(other.width).percent >= Width.parse(choice.width).percent
                if given.sparsity is not None
                else other.stored <= choice.stored
            )
            assert not small or losses[other.width] >= losses[choice.width] - 1e-12
    assert done.name == f"test-{budget}"


def test_what_cannot_be_is_one_clear_line(tiny_model: Path, tmp_path: Path) -> None:
    for steps, budget, settings, loss, message in (
        ((W4,), "50%", SETTINGS, "kl", "prunes nothing, and budget 50% says where zeros go; add a prune step"),
        ((W4,), "4.5bits", widths("4", "4s50"), "kl", "width 4s50 has zeros, and the recipe has no step that prunes"),
        ((Wanda(), W4), "4.5bits", widths("4", "8"), "kl", "wanda prunes weights, and no width of --widths has zeros"),
        ((Wanda(),), "4.5bits", widths("4s50"), "kl", "the recipe has no step that rounds; use 16 bits"),
        ((Wanda(pattern="2:4"),), "50%", SETTINGS, "kl", "pattern fixes it: leave it out"),
        ((SparseGPT(bits=4),), "50%", SETTINGS, "owl", "bits fixes it: let gptq follow"),
        ((Wanda(),), "75%", SETTINGS, "kl", "asks for more zeros than the widths have; lower it"),
        ((Wanda(),), "20%", SETTINGS, "owl", "owl shares out a mean sparsity of 36% to 64%"),
        ((Wanda(),), "1GB", SETTINGS, "kl", "they save no bytes; give the bits a weight"),
        (
            (Wanda(pattern="2:4"), dataclasses.replace(W4, store="2:4")),
            "4.5bits",
            SETTINGS,
            "kl",
            "rtn with store: 2:4 has 4 bits alone, and a budget chooses bits; give store: dense with it",
        ),
        ((Wanda(targets=("*.up_proj",)), W4), "50%", SETTINGS, "kl", "is pruned or rounded and not both"),
    ):
        with pytest.raises(ParetoError, match=message):
            compress_to_budget(
                tiny_model, recipe(*steps), Budget.parse(budget), tmp_path / "out", settings=settings, loss=loss
            )
    with pytest.raises(ParetoError, match="a share of zeros below 100%"):
        Budget.parse("120%")


def test_what_a_budget_pruned_is_trained_before_it_is_rounded(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    text = {"num_samples": 4, "length": 16, "held_out": 2, "batch": 2}
    given = recipe(Wanda(), Recover(**text, train_steps=8, bfloat16=False), W4)
    report, _ = compress_to_budget(
        tiny_model, given, Budget.parse("50%"), tmp_path / "out", settings=SETTINGS, loss="owl", text=text_file
    )
    assert report.trained is not None
    assert report.trained.after < report.trained.before
    assert report.sparsity is not None
    assert 0.49 < report.sparsity < 0.6
    assert {4.25, 4.5} >= {layer.bits_per_weight for layer in report.layers}
    with pytest.raises(ParetoError, match="movement chooses zeros while it trains, and a budget before; take a prune"):
        compress_to_budget(tiny_model, recipe(Movement(**text)), Budget.parse("50%"), tmp_path / "no", text=text_file)
