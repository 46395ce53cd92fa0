"""Recipes: the built-in ones load, and bad ones are refused with the line that says what would be right."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kv_cache.errors import ParetoError
from quant_methods.compress import compress
from quant_methods.handlers import BLOCK_STEPS, HANDLERS, MODEL_STEPS, PRUNERS, SOURCE_STEPS, STEPS, TRANSFORMS
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.kept import KeepZeros
from quant_methods.methods.omniquant import OmniQuant
from quant_methods.methods.pruning import Magnitude, Wanda
from quant_methods.methods.rotation import Rotate
from quant_methods.methods.rtn import RTN
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.methods.squeezellm import SqueezeLLM
from quant_methods.methods.trellis import Trellis
from quant_methods.recipe import Calibration, Recipe
from quant_methods.recipe_file import built_in_recipes, load_recipe, parse_recipe
from quant_methods.steps import KINDS, PruneStep, Step
from quant_methods.training.movement import Movement
from quant_methods.training.recovery import Recover
from quant_methods.training.tuning import Tune

HANDLED = {*HANDLERS, *PRUNERS, *TRANSFORMS, *BLOCK_STEPS, *SOURCE_STEPS, *MODEL_STEPS}


@dataclass(frozen=True)
class Halve(PruneStep):
    """A prune step with nothing that performs it."""

    method = "halve"


@pytest.mark.parametrize("name", built_in_recipes())
def test_built_in_recipes_load_and_describe_themselves(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    assert recipe.name == name
    assert {type(step) for step in recipe.steps} <= HANDLED


def test_gptq_w4_is_there() -> None:
    (step,) = load_recipe("gptq-w4").steps
    assert isinstance(step, GPTQ)
    assert (step.bits, step.group_size) == (4, 128)


def test_every_method_has_a_handler() -> None:
    assert set(STEPS.values()) == HANDLED
    assert {kind.kind for kind in HANDLED} <= set(KINDS)
    assert set(HANDLERS) == {RTN, GPTQ, SqueezeLLM, Trellis}
    assert set(PRUNERS) == {Magnitude, Wanda, SparseGPT, KeepZeros, Movement}
    assert set(TRANSFORMS) == {AWQ, SmoothQuant}
    assert set(BLOCK_STEPS) == {OmniQuant}
    assert set(SOURCE_STEPS) == {Rotate}
    assert set(MODEL_STEPS) == {Tune, Recover, Movement}
    assert all(STEPS[kind.method] is kind for kind in STEPS.values())


def test_a_recipe_survives_the_round_trip() -> None:
    recipe = load_recipe("gptq-w4-g32")
    assert parse_recipe(recipe.to_dict()) == recipe


def test_the_fingerprint_follows_what_determines_the_result() -> None:
    recipe = load_recipe("gptq-w4")
    assert dataclasses.replace(recipe, name="x", description="y").fingerprint() == recipe.fingerprint()
    assert dataclasses.replace(recipe, calibration=Calibration(seed=1)).fingerprint() != recipe.fingerprint()
    assert dataclasses.replace(recipe, kv_scales=False).fingerprint() != recipe.fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: []", "unknown key 'stepps'; valid keys: .*steps"),
        ("steps: [{method: gptq, grupsize: 3}]", "step gptq: unknown key 'grupsize'; valid keys: .*group_size"),
        (
            "steps: [{method: awqq}]",
            "unknown method 'awqq'; methods: awq, gptq, keep-zeros, magnitude, movement, omniquant, recover, rotate, ",
        ),
        ("steps: {method: gptq}", "steps: expected a list of mappings"),
        ("steps: [{method: gptq, bits: four}]", "step gptq: bits: expected int, got 'four'"),
        ("steps: [{method: gptq, bits: true}]", "step gptq: bits: expected int, got True"),
        ("steps: [{method: gptq, bits: 9}]", "bits: 9 is not served; use 2 to 8"),
        ("steps: [{method: gptq, bits: 1}]", "bits: 1 is not served; use 2 to 8"),
        ("steps: [{method: rtn, group_size: 16}]", "group_size: 16 has no kernel in vLLM; use 32, 64, 128, or -1"),
        ("steps: [{method: rtn, activations: int4}]", "activations: 'int4' is not one of none, int8, int6"),
        ("steps: [{method: rtn, search: best}]", "search: 'best' is not one of minmax, mse"),
        ("steps: [{method: rtn, outliers: 2}]", r"outliers: 2.0 is not in \[0, 0.5\)"),
        ("steps: [{method: rtn, outlier_bits: 4}]", "outlier_bits: 4 is neither 8 nor 16"),
        ("steps: [{method: gptq, rank: -1}]", "rank: -1 is negative"),
        ("steps: [{method: gptq, damping: 0}]", "damping: 0.0 is not in"),
        (
            "steps: [{method: rtn, bits: 4, activations: int8_static}]",
            "int8_static goes with 8-bit weights, group_size -1",
        ),
        ("ignore: lm_head", "ignore: expected a list of strings"),
        ("calibration: {samples: 3}", "calibration: unknown key 'samples'; valid keys: length, num_samples, seed"),
        ("calibration: {num_samples: 0}", "at least 1 sequence"),
        ("- a\n- b", "expected a mapping with the key 'steps'"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_recipes_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ParetoError, match=message) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ParetoError, match=r"recipe .*mine\.yaml: 'utf-8' codec can't decode"):
        load_recipe(str(path))


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ParetoError, match=r"unknown recipe 'gptq-w5'; built-in recipes: .*gptq-w4,"):
        load_recipe("gptq-w5")
    with pytest.raises(ParetoError, match=r"recipe missing\.yaml: no such file"):
        load_recipe("missing.yaml")


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (Rotate(), AWQ(), SmoothQuant(), Halve(), GPTQ(bits=4), RTN(bits=8), Tune()),
        (AWQ(), Halve(), Tune()),
        (Halve(), Recover(), GPTQ(), Tune()),
        (Movement(), GPTQ()),
        (OmniQuant(), RTN()),
    ],
    ids=len,
)
def test_steps_of_each_kind_come_in_order(steps: tuple[Step, ...]) -> None:
    Recipe("r", steps=steps).check()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((GPTQ(), AWQ()), "^recipe r: awq, a transform step, comes before gptq, a round step; the order of steps is "),
        ((Halve(), AWQ(), GPTQ()), "awq, a transform step, comes before halve, a prune step"),
        (
            (GPTQ(), Halve()),
            "halve, a prune step, comes before gptq, a round step; .* transform, prune, train, round, whole-",
        ),
        ((GPTQ(), Rotate()), "rotate comes once, and first"),
        ((Rotate(), Rotate(), GPTQ()), "rotate comes once, and first"),
        ((Tune(), GPTQ()), "tune comes once, and last: it works on what the other steps made"),
        ((GPTQ(), Tune(), Tune()), "tune comes once, and last"),
    ],
)
def test_steps_out_of_place_are_one_clear_line(steps: tuple[Step, ...], message: str) -> None:
    with pytest.raises(ParetoError, match=message):
        Recipe("r", steps=steps).check()
    with pytest.raises(ParetoError, match=message):
        compress("ref-7m", Recipe("r", steps=steps), "/nowhere")


def test_yaml_with_steps_out_of_place_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps: [{method: gptq}, {method: awq}]")
    with pytest.raises(ParetoError, match="awq, a transform step, comes before gptq"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.1}, "sparsity: 0.1 is not between 0.2 and 0.8"),
        ({"sparsity": 50.0}, "sparsity: 50.0 is not between 0.2 and 0.8; it is a fraction, and 0.5 is usual"),
        ({"pattern": "2of4"}, "pattern: '2of4' is neither 'any' nor N:M with N below M, such as '2:4'"),
        ({"pattern": "4:4"}, "neither 'any' nor N:M with N below M"),
        ({"pattern": "2:4", "sparsity": 0.6}, "2:4 makes 0.5 of the weights zero, and sparsity is 0.6"),
    ],
)
def test_prune_steps_check_their_settings(settings: dict[str, Any], message: str) -> None:
    Halve().check()
    Halve(sparsity=0.5, pattern="2:4").check()
    Halve(sparsity=0.667, pattern="1:3").check()
    with pytest.raises(ParetoError, match=message):
        Halve(**settings).check()


def test_what_cannot_be_pruned_is_refused_before_any_work(tmp_path: Path) -> None:
    for steps, message in (
        (
            (Halve(), SqueezeLLM()),
            "squeezellm rounds to a table, which need not hold a zero, so that halve",
        ),
        (
            (Halve(), Trellis()),
            "trellis rounds to a trellis code, which need not hold a zero, so that halve",
        ),
        (
            (Halve(), RTN(outliers=0.01)),
            "rtn adds outlier channels to its codes, which would fill halve's zeros; leave outliers out",
        ),
        ((OmniQuant(), Halve(), GPTQ()), "omniquant trains weights without regard to halve's zeros"),
        ((AWQ(), Halve()), "awq prepares weights for a step that rounds them, and there is none"),
        (
            (Halve(sparsity=0.4, pattern="3:5"),),
            "256 input channels, which are not whole groups of 5 as pattern 3:5",
        ),
    ):
        with pytest.raises(ParetoError, match=message):
            compress("ref-7m", Recipe("r", steps=steps), tmp_path / "out")
    assert not (tmp_path / "out").exists()
