"""The tune step: it lowers the KL it reports, keeps the codes, resumes to the same bytes, never ends worse."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kv_cache.errors import ParetoError
from kv_cache.scales import KVScales
from quant_methods import run
from quant_methods.calibration import calibrator
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import read_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.compress import compress
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.rotation import Rotate
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Calibration, Recipe
from quant_methods.recipe_file import parse_recipe
from quant_methods.steps import Step
from quant_methods.training.trainer import LOOKS, at_once
from quant_methods.training.tuning import Tune
from tests.quant_methods.random_layers import Parts

COARSE = RTN(bits=4, group_size=-1, symmetric=True, search="minmax")
TUNE = Tune(num_samples=8, length=24, held_out=4, epochs=4, batch=2, learning_rate=1e-2, seed=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are over before a second thread has woken up; waiting for it is most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(*steps: Step, **changes: Any) -> Recipe:
    given = Recipe("test", steps=steps, calibration=Calibration(6, 32, 3), kv_scales=False)
    return dataclasses.replace(given, **changes)


def contents(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def divergence(model: Path, checkpoint: Path, text: Path) -> float:
    """Return KL(model || checkpoint) over TUNE's held-out sequences, from the files alone."""
    seed = recipe().calibration.seed
    tokens = load_sequences(model, text, TUNE.num_samples + TUNE.held_out, TUNE.length, seed)[TUNE.num_samples :]
    with torch.no_grad():
        base, found = (load_reference(path)(tokens).logits.log_softmax(-1) for path in (model, checkpoint))
    return (base.exp() * (base - found)).sum(-1).mean().item()


@pytest.mark.parametrize(
    "steps",
    [
        (COARSE,),
        (Rotate(), dataclasses.replace(COARSE, bits=3)),
        (RTN(bits=8, group_size=-1, symmetric=True, activations="int8"),),
        (
            Parts(bits=3, table=True, sparse=True, targets=("q_proj", "k_proj", "v_proj")),
            Parts(bits=3, group_size=64, columns=2, rank=2, activations="int6"),
        ),
    ],
    ids=["w4", "rotated-w3", "w8a8", "parts"],
)
@pytest.mark.usefixtures("parts_handled")
def test_what_is_written_has_the_divergence_that_is_reported(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...]
) -> None:
    # Eight bits leave little to learn, and a rate that is right for fewer undoes it.
    eight = isinstance(steps[0], RTN) and steps[0].bits == 8
    tune = dataclasses.replace(TUNE, learning_rate=5e-4 if eight else TUNE.learning_rate)
    compress(tiny_model, recipe(*steps), tmp_path / "plain", text=text_file)
    report = compress(tiny_model, recipe(*steps, tune), tmp_path / "tuned", text=text_file)
    assert report.tuned is not None
    assert report.tuned.before == pytest.approx(divergence(tiny_model, tmp_path / "plain", text_file), rel=1e-3)
    assert report.tuned.after == pytest.approx(divergence(tiny_model, tmp_path / "tuned", text_file), rel=1e-3)
    assert report.tuned.after < 0.97 * report.tuned.before
    assert len(report.tuned.kl) == LOOKS + 1
    recorded = json.loads((tmp_path / "tuned" / RECIPE_FILE).read_text())
    assert recorded["tuned"]["kept_step"] == report.tuned.kept
    assert recorded["tuning"]["num_samples"] == 12


def test_scales_and_norms_move_and_nothing_else_does(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    compress(tiny_model, recipe(COARSE), tmp_path / "plain", text=text_file)
    compress(tiny_model, recipe(COARSE, TUNE), tmp_path / "tuned", text=text_file)
    compress(tiny_model, recipe(COARSE, dataclasses.replace(TUNE, norms=False)), tmp_path / "scales", text=text_file)
    plain, tuned, scales = (
        read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("plain", "tuned", "scales")
    )

    def moved(tensors: dict[str, torch.Tensor]) -> set[str]:
        assert tensors.keys() == plain.keys()
        assert all(tensors[name].dtype == plain[name].dtype for name in plain)
        return {name for name in plain if not torch.equal(tensors[name], plain[name])}

    ends = {name for name in plain if name.endswith(".weight_scale")}
    norms = {name for name in plain if "norm" in name}
    assert "model.norm.weight" in norms
    assert moved(scales) == ends
    assert moved(tuned) == ends | norms


def test_codes_move_only_when_asked(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    compress(tiny_model, recipe(COARSE), tmp_path / "plain", text=text_file)
    report = compress(
        tiny_model,
        recipe(COARSE, dataclasses.replace(TUNE, code_learning_rate=0.006)),
        tmp_path / "out",
        text=text_file,
    )
    plain, tuned = (read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("plain", "out"))
    codes = [name for name in plain if name.endswith(".weight_packed")]
    assert any(not torch.equal(plain[name], tuned[name]) for name in codes)
    assert report.tuned is not None
    assert report.tuned.after == pytest.approx(divergence(tiny_model, tmp_path / "out", text_file), rel=1e-3)


def test_a_run_never_ends_worse_than_it_began(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    wild = dataclasses.replace(TUNE, learning_rate=3.0)
    report = compress(tiny_model, recipe(COARSE, wild), tmp_path / "out", text=text_file)
    compress(tiny_model, recipe(COARSE), tmp_path / "plain", text=text_file)
    assert report.tuned is not None
    assert min(kl for step, kl in report.tuned.kl if step) > report.tuned.before, "the rate is wild enough to test it"
    assert report.tuned.kept == 0
    plain, tuned = (contents(tmp_path / name)["model.safetensors"] for name in ("plain", "out"))
    assert plain == tuned


class Interrupted(Exception):
    """Stands for Ctrl-C at a chosen moment."""


GIVEN = recipe(GPTQ(bits=4, group_size=64, symmetric=False), TUNE, kv_scales=True)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of GIVEN whose run nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "whole"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compress(tiny_model, GIVEN, out, text=text_file)
    torch.set_num_threads(threads)
    return out


@pytest.mark.parametrize(
    ("moment", "first"),
    [((11, "tuning"), 11), ((16, "tuning"), 15), ((1, "block 2/3"), None)],
)
def test_an_interrupted_tuning_resumes_to_the_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path, whole: Path, moment: tuple[int, str], first: int | None
) -> None:
    seen: list[tuple[int, str]] = []

    def interrupt(done: int, total: int, what: str) -> None:
        seen.append((done, what))
        # The blocks run twice, before the tuning and after; the second time is what is interrupted.
        again = moment[1] != "block 2/3" or any(said.startswith("tuning") for _, said in seen)
        if done == moment[0] and what.startswith(moment[1]) and again:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(tiny_model, GIVEN, tmp_path / "out", text=text_file, progress=interrupt)
    seen.clear()
    compress(
        tiny_model, GIVEN, tmp_path / "out", text=text_file, progress=lambda done, _, what: seen.append((done, what))
    )
    steps = [done for done, what in seen if what.startswith("tuning")]
    assert steps == ([] if first is None else list(range(first, TUNE.steps + 1))), "saved every second step"
    assert contents(tmp_path / "out") == contents(whole)


def test_kv_scales_are_those_of_the_tuned_model(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Scales alone would be calibrated in a quicker dtype, and on sequences that start as requests do.
    monkeypatch.setattr(calibrator, "quick_dtype", lambda device: torch.float32)
    monkeypatch.setattr(run, "kv_sequences", load_sequences)
    compress(tiny_model, recipe(COARSE, TUNE, kv_scales=True), tmp_path / "out", text=text_file)
    compress(tiny_model, recipe(COARSE, kv_scales=True), tmp_path / "untuned", text=text_file)
    # The written model as an ordinary one, whose scales are calibrated without any compression.
    shutil.copytree(tiny_model, tmp_path / "read")
    load_reference(tmp_path / "out").save_pretrained(tmp_path / "read")
    compress(tmp_path / "read", recipe(kv_scales=True), tmp_path / "expected", text=text_file)
    found, expected = (KVScales.load(tmp_path / name).layers for name in ("out", "expected"))
    for layer, same in zip(found, expected, strict=True):
        assert torch.allclose(layer.key_mean, same.key_mean, rtol=1e-3, atol=1e-3)
        assert torch.allclose(layer.value_size, same.value_size, rtol=1e-3)
    untuned = KVScales.load(tmp_path / "untuned").layer(2)
    assert (untuned.key_mean - expected[2].key_mean).norm() > 0.03 * expected[2].key_mean.norm()


def test_a_gpu_takes_as_many_sequences_at_once_as_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert at_once(1024, 49_152, cpu) == 1
    assert at_once(256, 2048, cpu) == 8
    for gib, expected in ((8, 1), (24, 2), (141, 8)):
        found = SimpleNamespace(total_memory=gib << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert at_once(1024, 49_152, gpu) == expected
    # A sequence whose logits alone are over the share still goes.
    assert at_once(4096, 262_144, gpu) == 1


def test_every_epoch_sees_every_sequence_once_in_its_own_order() -> None:
    epochs = [[i for step in range(4) for i in TUNE.order(epoch * 4 + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    odd = dataclasses.replace(TUNE, batch=3)
    taken = [i for step in range(odd.steps) for i in odd.order(step)]
    assert sorted(taken[:8]) == list(range(8)), "batches may span epochs"
    rates = [TUNE.rate(step) for step in range(TUNE.steps)]
    assert max(rates) <= 1
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((TUNE, COARSE), "tune comes once, and last"),
        ((COARSE, TUNE, TUNE), "tune comes once, and last"),
        ((TUNE,), "tune trains what a step that rounds weights made, and there is none"),
    ],
)
def test_a_tune_step_out_of_place_is_refused(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...], message: str
) -> None:
    with pytest.raises(ParetoError, match=message):
        compress(tiny_model, recipe(*steps), tmp_path / "out", text=text_file)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 0}, "1 held out"),
        ({"batch": 300}, "batch 300 is not between 1 and num_samples"),
        ({"learning_rate": 0.0}, "learning_rate and epochs are positive"),
        ({"rate": 1.0}, "unknown"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ParetoError, match=message):
        parse_recipe({"name": "r", "steps": [{"method": "rtn"}, {"method": "tune", **settings}]})
