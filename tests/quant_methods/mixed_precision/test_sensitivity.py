"""Sensitivities against direct computation, resuming, and budgets that are kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.quality import compare, log_probabilities, stored_bits
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress, prepare
from quant_methods.formats.grid import Grid
from quant_methods.methods.awq import AWQ
from quant_methods.methods.rotation import Rotate
from quant_methods.methods.rtn import RTN
from quant_methods.mixed_precision.budget import Budget
from quant_methods.mixed_precision.mixed import JSON_FILE, PLOT_FILE, compress_to_budget
from quant_methods.mixed_precision.sensitivity import Sensitivity, Settings
from quant_methods.mixed_precision.units import Unit, Width, units_of
from quant_methods.recipe import Calibration, Recipe
from quant_methods.training.tuning import Tune

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe("test", steps=(RTN(bits=4, group_size=64),), calibration=Calibration(6, 32, 3), kv_scales=False)
SETTINGS = Settings(widths=tuple(map(Width.parse, ("4", "4g32", "8", "16"))), kl_sequences=2, hessian_sequences=3)


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def measure(model: Path, text: Path, folder: Path, recipe: Recipe = RECIPE, settings: Settings = SETTINGS,
            stop: str = "") -> list[Unit]:  # fmt: skip
    _, decoder, plan = prepare(model, recipe, folder / "out", device="cpu", overwrite=False)
    tokens = load_sequences(model, text, 6, 32)

    def progress(done: int, total: int, what: str) -> None:
        if stop and stop in what:
            raise Interrupted

    return Sensitivity(
        decoder, plan, tokens, settings=settings, folder=folder / "measures", key="key", progress=progress
    ).measure()


@pytest.fixture(scope="module")
def units(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Unit]:
    return measure(tiny_model, text_file, tmp_path_factory.mktemp("measures"))


def test_units_are_what_vllm_merges(units: list[Unit]) -> None:
    assert [unit.name.removeprefix("model.layers.") for unit in units[:5]] == [
        "0.self_attn.{q_proj,k_proj,v_proj}",
        "0.self_attn.o_proj",
        "0.mlp.{gate_proj,up_proj}",
        "0.mlp.down_proj",
        "1.self_attn.{q_proj,k_proj,v_proj}",
    ]
    assert len(units) == 12
    assert all([choice.width for choice in unit.choices] == ["4", "4g32", "8", "16"] for unit in units)
    first = units[0]
    assert first.weights == 128 * (128 + 64 + 64)
    assert [choice.stored / first.weights for choice in first.choices] == [4.25, 4.5, 8.25, 16]
    assert (first.choices[-1].error, first.choices[-1].kl) == (0, 0)


@pytest.mark.parametrize("number", [0, 3, 6, 11])
def test_divergence_is_that_of_the_whole_model(
    tiny_model: Path, text_file: Path, tmp_path: Path, units: list[Unit], number: int
) -> None:
    # Quantize the one unit by an ordinary compression and run the whole model in transformers.
    unit = units[number]
    windows = load_sequences(tiny_model, text_file, 6, 32)[:2]
    original = load_reference(tiny_model)
    base = [log_probabilities(original, window) for window in windows]
    step = RTN(bits=8, group_size=64, search="minmax", targets=unit.layers)
    compress(tiny_model, dataclasses.replace(RECIPE, steps=(step,)), tmp_path / "one", text=text_file)
    model = load_reference(tmp_path / "one")
    quality = compare((log_probabilities(model, window) for window in windows), windows, base)
    # They leave out the last position of each window.
    assert unit.choices[2].kl == pytest.approx(quality.mean_kl, rel=0.1)


@torch.no_grad()
def test_error_is_that_of_the_outputs(tiny_model: Path, text_file: Path, units: list[Unit]) -> None:
    windows = load_sequences(tiny_model, text_file, 6, 32)[2:5]
    model = load_reference(tiny_model)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1).double()))
    for window in windows:
        model(window[None])
    x = torch.cat(seen)
    weight = layer.weight.double()
    # 8 bits: largest weight covered, one scale for 64 channels, stored in bfloat16.
    grouped = layer.weight.unflatten(1, (-1, 64))
    scale = (grouped.abs().amax(-1, keepdim=True) * 2 / 255).bfloat16().float()
    rounded = (torch.round(grouped / scale).clamp(-128, 127) * scale).flatten(1).double()
    expected = ((x @ (rounded - weight).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert units[7].layers == ("model.layers.1.mlp.down_proj",)
    assert units[7].choices[2].error == pytest.approx(expected, rel=1e-3)


def test_an_interrupted_measurement_goes_on_with_the_same_numbers(
    tiny_model: Path, text_file: Path, tmp_path: Path, units: list[Unit]
) -> None:
    with pytest.raises(Interrupted):
        measure(tiny_model, text_file, tmp_path, stop="block 3/3: self_attn.o_proj")
    assert sorted(path.name for path in (tmp_path / "measures").iterdir()) == ["block-00000.json", "block-00001.json"]
    before = (tmp_path / "measures" / "block-00001.json").stat().st_mtime_ns
    assert measure(tiny_model, text_file, tmp_path) == units
    assert (tmp_path / "measures" / "block-00001.json").stat().st_mtime_ns == before
    # Fewer widths are there already; another one is not.
    fewer = dataclasses.replace(SETTINGS, widths=SETTINGS.widths[::2])
    assert measure(tiny_model, text_file, tmp_path, settings=fewer, stop="block")[0].choices == units[0].choices[::2]
    with pytest.raises(Interrupted):
        measure(tiny_model, text_file, tmp_path, stop="block", settings=Settings(widths=(Width(4, -1),)))


def test_steps_before_the_rounding_are_measured_along(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    prepared = dataclasses.replace(RECIPE, steps=(Rotate(), AWQ(exponents=2), *RECIPE.steps))
    settings = dataclasses.replace(SETTINGS, widths=(Width(8), Width(16)), hessian_sequences=1)
    found = measure(tiny_model, text_file, tmp_path, prepared, settings)
    assert all(0 < unit.choices[0].kl < 0.01 for unit in found if unit.choices[0].kl is not None)
    # Taken up after its first block, the same numbers.
    for path in sorted((tmp_path / "measures").iterdir())[1:]:
        path.unlink()
    assert measure(tiny_model, text_file, tmp_path, prepared, settings) == found


@pytest.mark.parametrize("budget", ["4.6bits", "6bits", "2.3MB"])
def test_budgets_are_kept_and_used(
    tiny_model: Path, text_file: Path, tmp_path: Path, budget: str, units: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sensitivity, "measure", lambda self: units)
    said: list[Any] = []
    report, mixed = compress_to_budget(
        tiny_model, RECIPE, Budget.parse(budget), tmp_path / "out", settings=SETTINGS, text=text_file,
        chosen=said.append,
    )  # fmt: skip
    bits = stored_bits(tmp_path / "out", load_reference(tmp_path / "out"))
    size = Source(tmp_path / "out").size()
    (assignment,) = said
    assert assignment.bits_per_weight == pytest.approx(bits, abs=1e-9)
    assert assignment.size == pytest.approx(size, abs=32 * 21)
    limit, taken = (2.3e6, size) if budget == "2.3MB" else (float(budget[:-4]), bits)
    assert 0.97 * limit < taken <= limit
    document = json.loads((tmp_path / "out" / JSON_FILE).read_text())
    assert (tmp_path / "out" / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    chosen = {layer: unit["chosen"] for unit in document["units"] for layer in unit["layers"]}
    assert len(chosen) == 21
    carried_out = {layer: f"{s.bits}g{s.group_size}" for s in mixed.steps for layer in s.targets}  # type: ignore[attr-defined]
    names = {"4": "4g64", "4g32": "4g32", "8": "8g64"}
    assert carried_out == {layer: names[width] for layer, width in chosen.items() if width != "16"}
    assert {layer for layer, width in chosen.items() if width == "16"} == set(mixed.ignore) - {"lm_head"}
    assert len(report.layers) == len(carried_out)


def test_measures_are_used_again(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    def refuse(done: int, total: int, what: str) -> None:
        assert "in 4 bits" not in what

    given: dict[str, Any] = {"settings": SETTINGS, "text": text_file}
    compress_to_budget(tiny_model, RECIPE, Budget.parse("5bits"), tmp_path / "a", **given)
    first = json.loads((tmp_path / "a" / JSON_FILE).read_text())
    given |= {"measured": tmp_path / "a" / JSON_FILE}
    compress_to_budget(tiny_model, RECIPE, Budget.parse("6bits"), tmp_path / "b", progress=refuse, **given)
    second = json.loads((tmp_path / "b" / JSON_FILE).read_text())
    assert second["predicted_loss"] < first["predicted_loss"]
    # Training comes after, and changes none of them.
    tuned = dataclasses.replace(RECIPE, steps=(*RECIPE.steps, Tune(num_samples=2, length=16, held_out=1, epochs=1)))
    compress_to_budget(tiny_model, tuned, Budget.parse("6bits"), tmp_path / "tuned", **given)
    other = dataclasses.replace(RECIPE, steps=(RTN(bits=4, group_size=32),))
    with pytest.raises(ParetoError, match="was measured with another model, recipe"):
        compress_to_budget(tiny_model, other, Budget.parse("6bits"), tmp_path / "c", **given)


def test_scaled_measures_come_close(tiny_model: Path, text_file: Path, tmp_path: Path, units: list[Unit]) -> None:
    found = measure(tiny_model, text_file, tmp_path, settings=dataclasses.replace(SETTINGS, scaled=True))
    for scaled, whole in zip(found, units, strict=True):
        assert [c.error for c in scaled.choices] == [c.error for c in whole.choices]
        first = whole.choices[0]
        assert dataclasses.replace(scaled.choices[0], kl=first.kl) == first
        assert scaled.choices[0].kl == pytest.approx(first.kl, rel=1e-9)
        assert scaled.choices[3].kl == 0
        for one, other in zip(scaled.choices[1:3], whole.choices[1:3], strict=True):
            assert one.kl == pytest.approx(other.kl, rel=0.5)
    # Eight bits are some 250 times better than four: a wrong power would not pass.
    assert 0.5 < sum(u.choices[2].kl or 0 for u in found) / sum(u.choices[2].kl or 0 for u in units) < 2


def test_the_hessian_measure_needs_no_model_runs(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    said: list[Any] = []
    compress_to_budget(tiny_model, RECIPE, Budget.parse("5bits"), tmp_path / "a", settings=SETTINGS, loss="hessian",
                       text=text_file, chosen=said.append)  # fmt: skip
    assert all(choice.kl is None for unit in said[0].units for choice in unit.choices)
    assert 4.8 < said[0].bits_per_weight <= 5


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("4.1bits", r"less than the narrowest widths take \(4.250bits\)"),
        ("1MB", r"less than the narrowest widths take \(0.00\d+GB\)"),
        ("16bits", "leaves every layer at 16 bits"),
        ("4.25", "expected bits a weight, a size, or a share of zeros"),
        ("0bits", "expected bits a weight, a size, or a share of zeros"),
        ("5 GBit", "expected bits a weight, a size, or a share of zeros"),
    ],
)
def test_budgets_that_cannot_be(
    tiny_model: Path, text_file: Path, tmp_path: Path, budget: str, message: str, units: list[Unit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Sensitivity, "measure", lambda self: units)
    with pytest.raises(ParetoError, match=message):
        compress_to_budget(
            tiny_model, RECIPE, Budget.parse(budget), tmp_path / "out", settings=SETTINGS, text=text_file
        )


def test_exempt_layers_count(
    tiny_model: Path, text_file: Path, tmp_path: Path, units: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A third of the weights in 16 bits: 8 bits on average leave the others 4.25 at least, 4 bits do not.
    recipe = dataclasses.replace(RECIPE, exempt=("first",))
    monkeypatch.setattr(Sensitivity, "measure", lambda self: units[4:])
    with pytest.raises(ParetoError, match=r"narrowest widths take \(8\.167bits\)"):
        compress_to_budget(tiny_model, recipe, Budget.parse("8bits"), tmp_path / "a", settings=SETTINGS, text=text_file)
    compress_to_budget(tiny_model, recipe, Budget.parse("9bits"), tmp_path / "b", settings=SETTINGS, text=text_file)
    assert 8.8 < stored_bits(tmp_path / "b", load_reference(tmp_path / "b")) <= 9


def test_sizes_mean_what_they_say() -> None:
    assert Budget.parse("3.9GB").size == 3_900_000_000
    assert Budget.parse("3.9 GiB").size == int(3.9 * 2**30)
    assert Budget.parse("512MiB").size == 2**29
    assert (Budget.parse("4.25 bits").bits, Budget.parse("1bit").bits) == (4.25, 1)


def test_widths_are_read() -> None:
    assert Width.parse("4g32") == Width(4, 32)
    assert str(Width.parse("4g32")) == "4g32"
    assert Width(8).step(RTN(bits=4, group_size=32, symmetric=False)).grid == Grid(8, 32, True)
    for bad in ("g32", "four", "16g64", "4g", ""):
        with pytest.raises(ParetoError, match="expected bits, or bits and a group size"):
            Width.parse(bad)


def test_layers_of_unknown_names_stand_alone(tiny_model: Path, tmp_path: Path) -> None:
    _, decoder, plan = prepare(tiny_model, RECIPE, tmp_path / "out", device="cpu", overwrite=False)
    named = {"mixer.in": 0, "mixer.gate_proj": 0, "mixer.up_proj": 0}
    decoder.linears = lambda index: named  # type: ignore[assignment, method-assign]
    plan.steps.update({decoder.name(0, name): RTN() for name in named})
    assert units_of(decoder, plan, 0) == [["mixer.in"], ["mixer.gate_proj", "mixer.up_proj"]]
