"""Training of pruned weights: zeros stay what they are, the reported loss falls, runs resume to the same bytes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import read_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.compress import compress
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.kept import KeepZeros
from quant_methods.methods.pruning import Magnitude, Wanda
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.overrides import override
from quant_methods.recipe import Recipe
from quant_methods.recipe_file import parse_recipe
from quant_methods.steps import PruneStep, Step
from quant_methods.training import graphed, trainer
from quant_methods.training.masked_model import LearnedProduct, MaskedLinear, ScoredLinear
from quant_methods.training.movement import Movement
from quant_methods.training.recovery import Recover
from quant_methods.training.trainer import LOOKS
from quant_methods.training.tuned_model import Learned
from quant_methods.training.tuning import Tune
from tests.quant_methods.test_compress import Interrupted, contents, recipe

PRUNED = Magnitude(pattern="2:4")
TEXT: dict[str, Any] = {"num_samples": 8, "length": 24, "held_out": 4, "batch": 2, "bfloat16": False}
RECOVER = Recover(**TEXT, train_steps=24, learning_rate=2e-2)
MOVEMENT = Movement(**TEXT, train_steps=24, learning_rate=1e-2)
W4 = GPTQ(bits=4, group_size=64, symmetric=False)
TUNE = Tune(num_samples=8, length=24, held_out=4, batch=2, epochs=2, learning_rate=1e-2, code_learning_rate=0.02)
LAYERS = 21


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None:
    """Matrices this small gain nothing from a second thread."""


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = read_tensors(checkpoint / "model.safetensors")[0]
    return {name: tensor for name, tensor in found.items() if name.endswith("_proj.weight")}


def held_out(model: Path, checkpoint: Path, text: Path, *, on_text: bool = False) -> float:
    """Return the loss of a checkpoint over the held-out sequences, from the files alone."""
    tokens = load_sequences(model, text, 12, 24, recipe().calibration.seed)[8:]
    with torch.no_grad():
        base, found = (load_reference(path)(tokens).logits.log_softmax(-1) for path in (model, checkpoint))
    if on_text:
        return -found[:, :-1].gather(-1, tokens[:, 1:, None]).mean().item()
    return (base.exp() * (base - found)).sum(-1).mean().item()


@pytest.mark.parametrize(
    "step",
    [RECOVER, dataclasses.replace(RECOVER, lora=4), dataclasses.replace(RECOVER, loss="text", norms=False)],
    ids=["all weights", "low rank", "on text"],
)
@pytest.mark.parametrize("pattern", ["any", "2:4"])
def test_weights_learn_and_zeros_stay(
    tiny_model: Path, text_file: Path, tmp_path: Path, step: Recover, pattern: str
) -> None:
    prune = dataclasses.replace(PRUNED, pattern=pattern)
    compress(tiny_model, recipe(prune), tmp_path / "pruned", text=text_file)
    report = compress(tiny_model, recipe(prune, step), tmp_path / "out", text=text_file)
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "out")
    assert len(before) == LAYERS
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight == 0, before[name] == 0), name
        assert not torch.equal(weight, before[name]), name
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.tuned is None
    assert report.trained is not None
    on_text = step.loss == "text"
    expected = [held_out(tiny_model, tmp_path / name, text_file, on_text=on_text) for name in ("pruned", "out")]
    assert [report.trained.before, report.trained.after] == pytest.approx(expected, rel=2e-3)
    assert report.trained.after < 0.9 * report.trained.before
    assert len(report.trained.kl) == LOOKS + 1
    told = json.loads((tmp_path / "out" / RECIPE_FILE).read_text())
    assert told["trained"]["kept_step"] == report.trained.kept > 0
    assert told["training"]["num_samples"] == 12


@pytest.mark.parametrize("pattern", ["any", "2:4"])
def test_movement_chooses_its_zeros(tiny_model: Path, text_file: Path, tmp_path: Path, pattern: str) -> None:
    report = compress(
        tiny_model, recipe(dataclasses.replace(MOVEMENT, pattern=pattern)), tmp_path / "out", text=text_file
    )
    original = weights(tiny_model)
    smallest = 0.0
    for layer in report.layers:
        stored = weights(tmp_path / "out")[f"{layer.name}.weight"]
        assert layer.zeros == int((stored == 0).sum())
        assert layer.sparsity == pytest.approx(0.5, abs=1e-3)
        assert layer.relative_error > 0.3
        if pattern == "2:4":
            assert ((stored.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        sizes = original[f"{layer.name}.weight"].float().abs()
        smallest += float((sizes[stored == 0] < sizes.median()).float().mean()) / LAYERS
    assert 0.4 < smallest < 0.9, "they are not those of magnitude"
    assert report.trained is not None
    assert report.trained.before == 0, "nothing is zero at first"
    assert report.trained.kept >= 0.7 * MOVEMENT.steps
    assert report.trained.after == pytest.approx(held_out(tiny_model, tmp_path / "out", text_file), rel=2e-3)


def test_zeros_come_as_a_cubic_and_are_all_there_at_the_end() -> None:
    step = dataclasses.replace(MOVEMENT, train_steps=100, warm=0.1, cool=0.3)
    assert step.share(0) == step.share(10) == 0
    assert step.share(40) == pytest.approx(1 - 0.5**3)
    assert step.share(70) == step.share(100) == 1
    shares = [step.share(at) for at in range(101)]
    assert shares == sorted(shares)


RECIPES = {
    "recovered": recipe(PRUNED, RECOVER),
    "low rank": recipe(PRUNED, dataclasses.replace(RECOVER, lora=4), kv_scales=True),
    "rounded": recipe(PRUNED, RECOVER, W4, TUNE, kv_scales=True),
    "movement": recipe(MOVEMENT),
}


@pytest.mark.parametrize(
    "name", [name if name == "rounded" else pytest.param(name, marks=pytest.mark.long) for name in RECIPES]
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path, name: str
) -> None:
    given = RECIPES[name]
    seen: list[tuple[int, str]] = []
    compress(
        tiny_model, given, tmp_path / "whole", text=text_file, progress=lambda done, _, what: seen.append((done, what))
    )
    moments = [(13, "recovering" if name != "movement" else "pruning by movement")]
    if name == "rounded":
        moments += [(1, "block 2/3"), (3, "tuning"), (3, "writing the checkpoint")]
    for at, what in moments:
        assert any(done == at and said.startswith(what) for done, said in seen), "the moment comes"

        def interrupt(done: int, total: int, said: str, at: int = at, what: str = what) -> None:
            # The blocks of the first half are not what is interrupted.
            late = what != "block 2/3" or (tmp_path / "out.partial" / "trained").is_dir()
            if done == at and said.startswith(what) and late:
                raise Interrupted

        with pytest.raises(Interrupted):
            compress(tiny_model, given, tmp_path / "out", text=text_file, progress=interrupt)
    seen.clear()
    compress(
        tiny_model, given, tmp_path / "out", text=text_file, progress=lambda done, _, what: seen.append((done, what))
    )
    steps = [done for done, what in seen if what.startswith(moments[0][1])]
    assert steps == ([] if name == "rounded" else list(range(13, 25))), "saved every third step, or finished"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param((PRUNED, RECOVER, W4), id="rounded", marks=pytest.mark.long),
        pytest.param((PRUNED, RECOVER, W4, TUNE), id="tuned"),
        pytest.param((dataclasses.replace(MOVEMENT, pattern="2:4"), W4), id="movement", marks=pytest.mark.long),
    ],
)
def test_what_learned_is_rounded_with_its_zeros(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...]
) -> None:
    report = compress(tiny_model, recipe(*steps), tmp_path / "out", text=text_file)
    compress(tiny_model, recipe(*steps[: -1 if steps[-1] is W4 else -2]), tmp_path / "trained", text=text_file)
    zeros = {name: weight == 0 for name, weight in weights(tmp_path / "trained").items()}
    model = load_reference(tmp_path / "out")
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert (weight[zeros[f"{layer.name}.weight"]] == 0).all(), layer.name
        assert layer.zeros == int((weight == 0).sum())
        assert 4 < layer.bits_per_weight < 5
    told = json.loads((tmp_path / "out" / RECIPE_FILE).read_text())
    assert [step["method"] for step in told["recipe"]["steps"]] == [step.method for step in steps]
    assert told["model"] == tiny_model.name
    assert told["trained"]["kept_step"] > 0
    assert report.trained is not None
    if report.tuned is not None:
        # What is aimed at is the original, not what was trained.
        found = held_out(tiny_model, tmp_path / "out", text_file)
        assert report.tuned.after == pytest.approx(found, rel=2e-3)
        assert report.tuned.after < report.tuned.before


def test_tuning_keeps_the_zeros_of_codes(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    steps = (SparseGPT(pattern="2:4", bits=4, group_size=64, symmetric=False),)
    compress(tiny_model, recipe(*steps), tmp_path / "plain", text=text_file)
    # SparseGPT's codes are far from the original's weights, which is where codes that learn would start from.
    tune = dataclasses.replace(TUNE, code_learning_rate=0.0, epochs=6)
    report = compress(tiny_model, recipe(*steps, tune), tmp_path / "out", text=text_file)
    plain, tuned = (load_reference(tmp_path / name) for name in ("plain", "out"))
    moved = 0
    for layer in report.layers:
        before, after = (model.get_submodule(layer.name).weight for model in (plain, tuned))
        assert (after[before == 0] == 0).all()
        moved += int((after != before).sum())
    assert moved
    assert report.tuned is not None
    assert report.tuned.after < 0.98 * report.tuned.before


def test_zeros_of_a_model_pruned_before_are_kept_or_missed(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    compress(tiny_model, recipe(Wanda(pattern="2:4")), tmp_path / "pruned", text=text_file)
    report = compress(tmp_path / "pruned", recipe(KeepZeros(pattern="2:4"), W4), tmp_path / "out", text=text_file)
    model, zeros = load_reference(tmp_path / "out"), weights(tmp_path / "pruned")
    for layer in report.layers:
        assert (model.get_submodule(layer.name).weight[zeros[f"{layer.name}.weight"] == 0] == 0).all()
    on_text = dataclasses.replace(RECOVER, loss="text")
    compress(tmp_path / "pruned", recipe(KeepZeros(pattern="2:4"), on_text), tmp_path / "learned", text=text_file)
    learned = weights(tmp_path / "learned")
    assert all(torch.equal(learned[name] == 0, weight == 0) for name, weight in zeros.items())
    assert not all(torch.equal(learned[name], weight) for name, weight in zeros.items())
    for step, message in (
        (KeepZeros(pattern="1:4", sparsity=0.75), "has 2 of 4 neighbours that are not zero"),
        (KeepZeros(sparsity=0.6), r"has 50.0% zeros, and the recipe says sparsity 0.6"),
    ):
        with pytest.raises(ParetoError, match=message):
            compress(tmp_path / "pruned", recipe(step, W4), tmp_path / step.pattern[0], text=text_file)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((RECOVER,), "recover trains what a prune step left, and there is none"),
        ((RECOVER, W4), "recover trains what a prune step left, and there is none"),
        ((PRUNED, W4, RECOVER), "recover, a train step, comes before gptq, a round step"),
        ((PRUNED, RECOVER, RECOVER), "recover and recover both train the model; keep one"),
        ((PRUNED, MOVEMENT), "movement chooses zeros itself; leave magnitude out"),
        ((SparseGPT(bits=4), RECOVER), "recover trains weights in 16 bits, and sparsegpt with bits has rounded them"),
        (
            (KeepZeros(), RECOVER),
            "aims at what the dense model puts out, and keep-zeros starts from one that was pruned",
        ),
        ((AWQ(), PRUNED, RECOVER, W4), "recover trains the model as it is stored; leave awq out"),
        ((PRUNED, RECOVER, Tune()), "tune trains what a step that rounds weights made, and there is none"),
    ],
)
def test_steps_out_of_place_are_refused_before_any_work(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...], message: str
) -> None:
    with pytest.raises(ParetoError, match=message):
        compress(tiny_model, recipe(*steps), tmp_path / "out", text=text_file)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("recover", {"held_out": 0}, "recover needs at least 1 sequence and 1 held out"),
        ("recover", {"batch": 600}, r"recover: batch 600 is not between 1 and num_samples \(512\)"),
        ("recover", {"train_steps": 0}, "recover: learning_rate and train_steps are positive, got 0.01 and 0"),
        ("recover", {"lora": -1}, "recover: lora -1 is negative; 16 is usual"),
        ("recover", {"loss": "mse"}, "'mse' is not one of kl, text"),
        ("movement", {"warm": 0.5, "cool": 0.5}, "warm 0.5 and cool 0.5 leave no step to prune in"),
        ("movement", {"refit": True}, "movement: refit has nothing to fit"),
        ("movement", {"sparsity": 0.9}, "sparsity: 0.9 is not between"),
        ("keep-zeros", {"refit": True}, "keep-zeros: refit has nothing to fit to"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ParetoError, match=message):
        parse_recipe({"name": "r", "steps": [{"method": "wanda"}, {"method": method, **settings}]})


def test_a_product_is_the_same_in_training_as_when_it_is_stored() -> None:
    start = torch.randn(12, 20).bfloat16() * (torch.rand(12, 20) > 0.5)
    layer = MaskedLinear(LearnedProduct(start, 3, torch.Generator().manual_seed(0)), start != 0, None)
    assert torch.equal(layer.stored(), start)
    assert isinstance(layer.learned, LearnedProduct)
    torch.nn.init.normal_(layer.learned.up)
    expected = start.double() + start.double().abs().mean(1, keepdim=True) * (
        layer.learned.up.double() @ layer.learned.down.double()
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight(), layer.stored().float())
    assert torch.allclose(layer.stored().double(), expected * (start != 0), rtol=2**-8, atol=1e-6)
    layer.weight().sum().backward()
    assert layer.learned.down.grad is not None
    unit = start.float().abs().mean(1, keepdim=True)
    assert torch.allclose(layer.learned.down.grad, layer.learned.up.detach().T @ (unit * (start != 0)), rtol=1e-4)


def test_scores_learn_by_what_their_weights_would_do() -> None:
    start = torch.randn(6, 10)
    layer, mask, x = ScoredLinear(Learned(start), None), torch.rand(6, 10) > 0.5, torch.randn(4, 10)
    layer.mask.copy_(mask)
    rising = torch.randn(4, 6)
    out = layer(x)
    assert torch.equal(out, x @ (start * mask).T)
    (out * rising).sum().backward()
    gradient = rising.T @ x
    assert layer.scores.grad is not None
    assert torch.allclose(layer.scores.grad, gradient * start, rtol=1e-4, atol=1e-5)
    assert isinstance(layer.learned, Learned)
    assert layer.learned.offset.grad is not None
    unit = start.abs().mean(1, keepdim=True)
    assert torch.allclose(layer.learned.offset.grad, gradient * mask * unit, rtol=1e-4, atol=1e-5)


def test_flags_change_what_trains() -> None:
    given = override(
        recipe(PRUNED, RECOVER, W4, TUNE),
        {"train_steps": 3000, "lora": 8, "loss": "text", "train_samples": 99, "train_length": 77},
    )
    own = {"num_samples": 99, "length": 77}
    assert given.steps == (
        PRUNED,
        dataclasses.replace(RECOVER, train_steps=3000, lora=8, loss="text", **own),
        W4,
        dataclasses.replace(TUNE, **own),
    )
    with pytest.raises(ParetoError, match="--train-samples: no step of recipe test has it"):
        override(recipe(PRUNED), {"train_samples": 5})


def test_an_unfinished_run_of_another_training_is_not_taken_up(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what.startswith("block 2/3") and (tmp_path / "out.partial" / "trained").is_dir():
            raise Interrupted

    def run(given: Recipe, **changes: Any) -> None:
        compress(tiny_model, given, tmp_path / "out", text=text_file, **changes)

    with pytest.raises(Interrupted):
        run(recipe(PRUNED, RECOVER, W4), progress=interrupt)
    other = recipe(PRUNED, dataclasses.replace(RECOVER, seed=1), W4)
    with pytest.raises(ParetoError, match="trained was trained with a different recipe; repeat that command"):
        run(other)
    run(other, overwrite=True)
    compress(tiny_model, other, tmp_path / "expected", text=text_file)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_every_prune_step_may_come_before(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    first = ("model.layers.0.*",)
    steps: tuple[PruneStep, ...] = (Wanda(targets=first, refit=True), SparseGPT(pattern="4:8"))
    report = compress(tiny_model, recipe(*steps, RECOVER, W4), tmp_path / "out", text=text_file)
    assert all(layer.sparsity is not None and layer.sparsity >= 0.49 for layer in report.layers)


class Replayed:
    """Stands for a CUDA graph: the same loss on copies of what it is given."""

    made = 0

    def __init__(self, loss, parameters, tokens, targets):
        type(self).made += 1
        self.loss, self.tokens, self.targets = loss, tokens.clone(), targets.clone()
        loss(tokens, targets).backward()
        for parameter in parameters:
            parameter.grad.zero_()

    def fits(self, tokens):
        return tokens.shape == self.tokens.shape

    def add(self, tokens, targets):
        self.tokens.copy_(tokens)
        self.targets.copy_(targets)
        self.loss(self.tokens, self.targets).backward()


def test_a_graph_of_the_first_micro_batch_trains_the_same(tiny_model, text_file, tmp_path, monkeypatch):
    """Three sequences, two at a time: the graph is captured for two, and one goes without."""
    monkeypatch.setattr(trainer, "at_once", lambda *sizes: 2)
    step = dataclasses.replace(RECOVER, batch=3, train_steps=8)
    compress(tiny_model, recipe(PRUNED, step), tmp_path / "plain", text=text_file)
    monkeypatch.setattr(trainer, "keeps_activations", lambda *sizes: True)
    monkeypatch.setattr(graphed, "GraphedGradients", Replayed)
    compress(tiny_model, recipe(PRUNED, step), tmp_path / "graphed", text=text_file)
    assert Replayed.made == 1
    plain, found = weights(tmp_path / "plain"), weights(tmp_path / "graphed")
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("step", [RECOVER, dataclasses.replace(RECOVER, loss="text"), TUNE], ids=["kl", "text", "tune"])
def test_a_cuda_graph_trains_as_single_kernels_do(tiny_model, text_file, tmp_path, monkeypatch, step):
    rounding = [W4] if isinstance(step, Tune) else []
    said = []
    reports = []
    for name in ("graph", "single"):
        told = recipe(PRUNED, *rounding, step)
        reports.append(
            compress(
                tiny_model, told, tmp_path / name, text=text_file, device="cuda", progress=lambda *a: said.append(a)
            )
        )
        monkeypatch.setattr(trainer, "keeps_activations", lambda *sizes: False)
    assert not any("without a CUDA graph" in str(each) for each in said)
    graph, single = (report.tuned or report.trained for report in reports)
    losses = [[loss for _, loss in trained.kl] for trained in (graph, single)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
