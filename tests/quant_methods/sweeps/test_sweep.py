"""Sweeps: points, resuming, results; settings that change recipes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.quality import compare, log_probabilities
from quant_methods.checkpoints.reference import load_reference
from quant_methods.methods.rtn import RTN
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.mixed_precision.budget import Budget
from quant_methods.mixed_precision.sensitivity import Settings
from quant_methods.mixed_precision.units import Width
from quant_methods.overrides import override
from quant_methods.recipe import Calibration, Recipe
from quant_methods.recipe_file import load_recipe
from quant_methods.steps import Step
from quant_methods.sweeps import sweep as sweep_module
from quant_methods.sweeps.file import load_sweep
from quant_methods.sweeps.plot import family, frontier, labels
from quant_methods.sweeps.sweep import SweepRun, markdown

SMALL = "num_calibration_samples: [4], calibration_length: [32], kv_scales: [false]"
SHIPPED = Path(__file__).parents[3] / "bench" / "sweeps"


pytestmark = pytest.mark.usefixtures("one_thread")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def grid(tmp_path: Path, text_file: Path) -> Path:
    held_out = written(tmp_path / "heldout.txt", text_file.read_text()[3000:])
    return written(
        tmp_path / "grid.yaml",
        f"""
recipe: rtn-w4
grid: {{group_size: [32, 64], bits: [4, 6], {SMALL}}}
variants:
  - {{recipe: rtn-w4, group_size: 64, budget: 9bits, num_calibration_samples: 4, calibration_length: 32,
     kv_scales: false, exempt: [last]}}
evaluation: {{text: {held_out.name}, num_windows: 2, window_tokens: 48}}
""",
    )


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def run(model: Path, grid: Path, out: Path, text: Path, **more: Any) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    stop = more.pop("stop", "")
    settings = Settings(widths=(Width(4), Width(8), Width(16)), kl_sequences=1, hessian_sequences=1)

    def progress(done: int, total: int, point: str, step: int, steps: int, what: str) -> None:
        if not said or said[-1] != point:
            said.append(point)
        if stop and stop in f"{point} {what}":
            raise Interrupted

    made = SweepRun(model, load_sweep(grid, "gptq-w4"), out, text=text, settings=settings, progress=progress, **more)
    return made.run(), said


def test_a_sweep_is_one_table_and_goes_on_where_it_stopped(
    tiny_model: Path, text_file: Path, grid: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(tiny_model, grid, out, text_file, stop="group_size=64 bits=4")
    half = json.loads((out / "sweep.json").read_text())
    assert [row["name"].split(" num_")[0] for row in half["rows"]] == [
        "rtn-w4 group_size=32 bits=4",
        "rtn-w4 group_size=32 bits=6",
    ]
    assert (out / "sweep.md").read_text().count("\n") == 4
    rows, said = run(tiny_model, grid, out, text_file)
    assert not any("group_size=32" in point for point in said)
    assert rows[:2] == half["rows"]
    assert [round(row["bits_per_weight"], 2) for row in rows[:4]] == [4.62, 6.75, 4.31, 6.38]
    assert 8.8 < rows[4]["bits_per_weight"] <= 9
    assert json.loads((out / "sweep.json").read_text())["rows"] == rows
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["sweep.json", "sweep.md", "sweep.png"]
    assert not (tmp_path / "out.partial").exists()
    # More bits, less divergence; in the table every row has its number.
    assert rows[0]["kl"] > 8 * rows[1]["kl"]
    assert rows[2]["kl"] > 8 * rows[3]["kl"]
    assert [line.split("|")[1].strip() for line in markdown(rows, "tiny").splitlines()[2:]] == ["1", "2", "3", "4", "5"]
    again, said = run(tiny_model, grid, out, text_file)
    assert again == rows
    assert said == [""]


def test_a_row_is_what_measuring_the_checkpoint_gives(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    grid = written(tmp_path / "grid.yaml", f"grid: {{recipe: [rtn-w4], group_size: [64], {SMALL}}}\n"
                   "evaluation: {num_windows: 2, window_tokens: 24}\n")  # fmt: skip
    (row,), _ = run(tiny_model, grid, tmp_path / "out", text_file, keep=True)
    (checkpoint,) = (tmp_path / "out" / "points").iterdir()
    original, model = load_reference(tiny_model), load_reference(checkpoint)
    from quant_methods.calibration.text_source import load_sequences

    windows = load_sequences(tiny_model, None, 2, 24, split="evaluation")
    base = [log_probabilities(original, window) for window in windows]
    quality = compare((log_probabilities(model, window) for window in windows), windows, base)
    assert row["kl"] == pytest.approx(quality.mean_kl, rel=1e-5)
    assert row["perplexity"] == pytest.approx(quality.perplexity, rel=1e-5)
    assert row["top1_agreement"] == quality.mean_top1
    # Kept checkpoints are measured, not made again, if only the table is lost.
    (tmp_path / "out" / "sweep.json").unlink()
    made = (checkpoint / "model.safetensors").stat().st_mtime_ns
    (again,), _ = run(tiny_model, grid, tmp_path / "out", text_file, keep=True)
    assert again["kl"] == row["kl"]
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == made


def test_results_of_something_else_are_not_mixed_in(
    tiny_model: Path, text_file: Path, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SweepRun, "_point", lambda self, number, yardstick: {"key": self.keys[number], **ROW})
    monkeypatch.setattr(sweep_module.shutil, "rmtree", lambda *args, **more: None)
    run(tiny_model, grid, tmp_path / "out", text_file)
    other = written(tmp_path / "other.yaml", grid.read_text().replace("num_windows: 2", "num_windows: 1"))
    with pytest.raises(ParetoError, match=r"holds results of another model or evaluation text; .*--overwrite"):
        run(tiny_model, other, tmp_path / "out", text_file)
    run(tiny_model, other, tmp_path / "out", text_file, overwrite=True)


ROW = {"name": "a", "bits_per_weight": 4.0, "checkpoint_bytes": 1, "kl": 0.1, "top1_agreement": 1.0, "perplexity": 2.0,
       "compress_seconds": 1.0, "settings": {}, "recipe": {"steps": [{"method": "rtn"}]}}  # fmt: skip


def test_the_frontier_is_what_nothing_beats() -> None:
    bits_and_kl = [(4, 0.1), (4, 0.2), (5, 0.3), (6, 0.05), (8, 0.05)]
    rows = [{"bits_per_weight": bits, "kl": kl} for bits, kl in bits_and_kl]
    assert frontier(rows) == [rows[0], rows[3]]


def test_marks_are_named_by_what_was_done() -> None:
    rotated = [{"method": "rotate"}, {"method": "gptq", "activations": "int8", "outliers": 0.01, "rank": 0}]
    assert family({"recipe": {"steps": rotated}, "settings": {}}) == "rotate + gptq, outliers apart, A8"
    mixed = [{"method": "gptq", "activations": "none"}, {"method": "gptq", "activations": "none", "rank": 8}]
    assert family({"recipe": {"steps": mixed}, "settings": {"budget": "4bits"}}) == "gptq, low rank, mixed bits"


def test_numbers_of_marks_close_together_share_a_place() -> None:
    bits_and_kl = [(2.5, 0.1), (4.0, 0.0100), (4.1, 0.0101), (4.4, 0.0102), (8.0, 0.001)]
    places = labels([{"bits_per_weight": bits, "kl": kl} for bits, kl in bits_and_kl])
    assert [(numbers, at[0], side) for numbers, at, side in places] == [
        ([1], 2.5, 1), ([4], 4.4, 1), ([2, 3], 4.0, -1), ([5], 8.0, 1)
    ]  # fmt: skip
    # Where there is no room on the left, numbers go to the right all the same.
    assert {side for _, _, side in labels([{"bits_per_weight": b, "kl": k} for b, k in bits_and_kl[1:]])} == {1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [1]", "grid: expected lists by setting"),
        ("points: []", "expected a mapping with 'grid'"),
        ("grid: {group_size: 64}", "grid: group_size: expected a list of values to try, got 64"),
        ("grid: {groupsize: [64]}", "unknown key 'groupsize'; valid keys: recipe, budget, bits, group_size"),
        ("grid: {bits: [4]}\nmodel: x", "unknown key 'model'; valid keys: recipe, grid, variants, evaluation"),
        ("grid: {bits: [four]}", "point gptq-w4 bits=four: bits: expected int, got 'four'"),
        ("grid: {bits: [9]}", "point gptq-w4 bits=9: bits: 9 is not served"),
        ("variants: [{recipe: rtn-w4, act_order: true}]", "--act-order: no step of recipe rtn-w4 has it"),
        ("variants: [rtn-w4]", "variants: expected a list of points"),
        ("variants: [{recipe: rtn-w5}]", "unknown recipe 'rtn-w5'"),
        ("variants: [{budget: lots}]", "expected bits a weight, a size, or a share of zeros"),
        ("variants: [{exempt: [middle]}]", "exempt: 'middle' is unknown"),
        ("grid: {bits: [4, 4]}", "bits=4 is the same as gptq-w4 bits=4; leave one out"),
        ("grid: {bits: [4]}\nevaluation: {text: nowhere.txt}", "evaluation: text: .*nowhere.txt: no such file"),
        ("grid: {bits: [4]}\nevaluation: {windows: 3}", "evaluation: unknown key 'windows'"),
        ("grid: {bits: [4", "is not valid YAML"),
    ],
)
def test_bad_grids_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ParetoError, match=message) as caught:
        load_sweep(written(tmp_path / "grid.yaml", text), "gptq-w4")
    assert "\n" not in str(caught.value)


def test_a_point_that_the_model_cannot_have_is_refused_before_the_first(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    grid = written(tmp_path / "grid.yaml", f"grid: {{recipe: [rtn-w4], group_size: [64, 128], {SMALL}, "
                   "group_size_fallback: [refuse]}\nevaluation: {num_windows: 1, window_tokens: 24}\n")  # fmt: skip
    with pytest.raises(ParetoError, match=r"group_size=128.*does not divide the 192 input channels"):
        run(tiny_model, grid, tmp_path / "out", text_file)
    assert not (tmp_path / "out" / "sweep.json").exists()


STEPS: tuple[Step, ...] = (SmoothQuant(alpha=0.5), RTN(bits=8, group_size=-1))
RECIPE = Recipe("test", steps=STEPS, calibration=Calibration(6, 32, 3), kv_scales=False)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"alpha": 0.3}, {"steps": (SmoothQuant(alpha=0.3), STEPS[1])}),
        ({"activations": "int6"}, {"steps": (STEPS[0], RTN(bits=8, group_size=-1, activations="int6"))}),
        ({"per_tensor": True}, {"steps": (STEPS[0], RTN(bits=8, group_size=-1, per_tensor=True))}),
        ({"outlier_handling": False}, {"steps": STEPS[1:]}),
        ({"outlier_handling": True, "bits": None}, {}),
        ({"num_calibration_samples": 512, "seed": 0}, {"calibration": Calibration(512, 32, 0)}),
        ({"exempt": ["first", "last"], "ignore": ["k_proj"]}, {"exempt": ("first", "last"), "ignore": ("k_proj",)}),
    ],
)
def test_settings_change_recipes(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert override(RECIPE, settings) == dataclasses.replace(RECIPE, **expected)


def test_outlier_handling_is_not_turned_off_where_there_is_none() -> None:
    with pytest.raises(ParetoError, match="recipe rtn-w4 does nothing about outliers"):
        override(load_recipe("rtn-w4"), {"outlier_handling": False})


def test_points_name_what_they_change(tmp_path: Path) -> None:
    path = written(tmp_path / "g.yaml", "variants: [{recipe: gptq-w4, budget: 4.25bits, exempt: [first, last]}]")
    (point,) = load_sweep(path, "rtn-w4").points
    assert point.name == "gptq-w4 budget=4.25bits exempt=first+last"
    assert point.budget == Budget("4.25bits", bits=4.25)
    assert point.recipe.exempt == ("first", "last")


@pytest.mark.parametrize("shipped", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_grids_that_ship_are_read(tmp_path: Path, shipped: Path) -> None:
    written(tmp_path / "heldout.jsonl", "")
    assert len(load_sweep(written(tmp_path / shipped.name, shipped.read_text()), "gptq-w4").points) > 5
