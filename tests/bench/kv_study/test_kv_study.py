"""pareto kv-study on the embedded model, with windows of a few tokens."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.kv_study import command as kv_study_command
from bench.kv_study import run as kv_study_run
from bench.kv_study.plant import plant_key_bias, plant_value_outliers
from bench.kv_study.run import read_report
from bench.kv_study.study import StudiedModel
from kv_cache.errors import ParetoError
from kv_cache.simulate.coder import Coder, Decoded, all_but_newest
from kv_cache.simulate.registry import ENTRIES
from quant_methods.model_source import resolve_model
from tests.end_to_end.engines import write_gpt_oss

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model():
    model = StudiedModel(resolve_model("ref-7m"), "cpu", batch_tokens=128)
    tokens = torch.randint(100, 8000, (6, 64))
    model.calibrate(tokens[:4])
    model.refer(tokens[4:])
    return model


class Given(Coder):
    """Reads back what a function makes of keys and values."""

    def __init__(self, change, **exact):
        self.change, self.exact = change, exact

    def code(self, layer, key, value, run):
        return Decoded(*self.change(key, value), **{name: make(key) for name, make in self.exact.items()})

    def bits(self, shape, tokens):
        return 16.0


def test_what_is_read_back_exactly_costs_nothing(model):
    loss = model.measure(Given(lambda key, value: (key.clone(), value.clone())))
    assert max(map(abs, loss.kl)) < 1e-9
    assert min(loss.top1) == 1
    assert loss.nll == pytest.approx(model.reference_nll, abs=1e-5)


def test_sinks_are_refused(tmp_path):
    with pytest.raises(ParetoError, match="gpt-oss: this model has attention sinks: the study has no coders for such"):
        StudiedModel(write_gpt_oss(tmp_path / "gpt-oss"), "cpu")


def test_fewer_bits_cost_more(model):
    losses = []
    for name in ("int8_per_head", "int6_per_head", "int4_per_head", "k2v2_per_head"):
        coder = ENTRIES[name].make()
        model.fit(coder)
        losses.append(sum(model.measure(coder).kl))
    assert 0 < losses[0] < 0.02
    assert losses == sorted(losses)
    assert losses[-1] > 20 * losses[0]


def hidden_of(model, coder):
    """The decoder's output for the first test window."""
    kept = []
    before, model._compare = model._compare, lambda tokens, reference, hidden, loss: kept.append(hidden)
    try:
        model.measure(coder)
    finally:
        model._compare = before
    return kept[0]


def spoiled(token):
    def change(key, value):
        value = value.clone()
        value[:, token] += 3
        return key, value

    return change


def test_attention_is_causal_over_what_was_read_back(model):
    moved = (hidden_of(model, Given(spoiled(20))) - model.reference[0]).abs().amax(-1)
    assert moved[:20].max() < 5e-5
    # The query's own token is read from codes too.
    assert moved[20] > 1e-3
    assert moved[21:].min() > 1e-4


def test_the_newest_tokens_are_seen_as_they_are_if_the_coder_says_so(model):
    coder = Given(spoiled(20), coded_values=lambda key: all_but_newest(key, 8))
    moved = (hidden_of(model, coder) - model.reference[0]).abs().amax(-1)
    assert moved[:28].max() < 5e-5
    assert moved[28] > 1e-4


def test_only_the_sides_asked_for_are_coded(model):
    coder = ENTRIES["k2v2_per_head"].make()
    model.fit(coder)
    everything = sum(model.measure(coder).kl)
    one = sum(model.measure(coder, only={(3, "value")}).kl)
    keys = sum(model.measure(coder, only={(layer, "key") for layer in range(6)}).kl)
    assert max(map(abs, model.measure(coder, only=set()).kl)) < 1e-7  # other sums
    assert 0 < one < everything
    assert 0 < keys < everything


def test_layers_in_pairs_see_a_pass_in_full_precision(model):
    coder = ENTRIES["low_rank_64_of_pairs"].make()
    model.fit(coder)
    assert sum(model.measure(coder).kl) > 0.01


def test_samples_are_the_layers_own(model):
    assert len(model.samples) == 6
    sample = model.samples[2]
    assert sample.key.shape == sample.value.shape == (4, 64, 2, 64)
    assert sample.first_key.shape == (4 + 256, 2, 64)
    assert sample.query.shape == (4, 64, 4, 64)
    assert sample.value_metric.shape == (2, 64, 64)
    assert sample.scaling == pytest.approx(1 / 8)


def loaded():
    return StudiedModel(resolve_model("ref-7m"), "cpu")


def test_value_outliers_change_values_but_not_the_model():
    model, tokens = loaded(), torch.randint(100, 8000, (1, 64))
    before = model.refer(tokens)
    model.calibrate(tokens)
    spread = model.samples[1].value.std((0, 1))
    plant_value_outliers(model.model, 16.0, seed=3)
    assert model.refer(tokens) == pytest.approx(before, abs=1e-3)
    model.calibrate(tokens)
    factors = (model.samples[1].value.std((0, 1)) / spread).flatten()
    assert sorted(factors.round().tolist()) == [1.0] * 124 + [16.0] * 4


def test_key_biases_lie_in_six_channels_before_rotary_embedding():
    model, tokens = loaded(), torch.randint(100, 8000, (1, 64))
    model.calibrate(tokens)
    plain = model.samples[0]
    plant_key_bias(model.model, 60.0)
    model.calibrate(tokens)
    positions = torch.arange(64)
    moved = plain.rotary.turn(model.samples[0].key, -positions) - plain.rotary.turn(plain.key, -positions)
    torch.testing.assert_close(moved, moved[:1, :1].expand_as(moved), rtol=1e-3, atol=1e-3)
    assert sorted(moved[0, 0, 1].round().tolist()) == [-60.0] * 3 + [0.0] * 58 + [60.0] * 3


def arguments(out, *more):
    """Flags of a tiny run on this project's own pages."""
    files = []
    for name in ("loadtest", "compression"):
        files.append(out / f"{name}.txt")
        files[-1].write_text((ROOT / "docs" / f"{name}.md").read_text())
    return [
        "ref-7m", "--text", str(files[0]), "--num-windows", "3", "--window-tokens", "32", "--calibration",
        str(files[1]), "--calibration-windows", "2", "--calibration-tokens", "32", "--out", str(out), *more,
    ]  # fmt: skip


def test_a_run_writes_table_json_and_picture_and_is_continued(tmp_path, capsys, monkeypatch):
    measured = []
    measure = StudiedModel.measure

    def counted(self, coder, only=None):
        measured.append(type(coder).__name__)
        return measure(self, coder, only)

    monkeypatch.setattr(StudiedModel, "measure", counted)
    assert kv_study_command.main(arguments(tmp_path, "--coder", "int4_per_head", "fp8")) == 0
    assert measured == ["Ours", "Plain"]
    report = read_report(tmp_path / "kv-study.json")
    assert report.status == "complete"
    assert [coder.name for coder in report.coders] == ["int4_per_head", "fp8"]
    ours = report.coders[0]
    assert ours.bits == 4.25
    assert len(ours.windows) == 3
    assert ours.kl.value == pytest.approx(sum(w.kl for w in ours.windows) / 3)
    assert ours.kl.standard_error > 0
    assert ours.perplexity_change.n == 3
    assert report.environment["versions"]["torch"] == torch.__version__
    assert (tmp_path / "kv-study.png").read_bytes().startswith(b"\x89PNG")
    assert "| int4_per_head | * | 4.25 |" in (tmp_path / "kv-study.md").read_text()
    assert "int4_per_head" in capsys.readouterr().out

    # Finished coders are left alone, others are added, in the registry's order.
    assert kv_study_command.main(arguments(tmp_path, "--coder", "fp8", "bf16")) == 0
    assert measured[2:] == ["Plain"]
    again = read_report(tmp_path / "kv-study.json")
    assert [coder.name for coder in again.coders] == ["bf16", "int4_per_head", "fp8"]
    assert again.coders[1] == ours
    assert kv_study_command.main(arguments(tmp_path, "--coder", "fp8")) == 0
    assert len(measured) == 3
    assert kv_study_command.main(arguments(tmp_path, "--coder", "fp8", "--again", "fp8")) == 0
    capsys.readouterr()
    assert kv_study_command.main(arguments(tmp_path, "--coder", "fp8", "--again", "int4_per_head")) == 2
    assert "--again names coders that --coder does not: int4_per_head" in capsys.readouterr().err
    assert len(measured) == 4

    assert kv_study_command.main(arguments(tmp_path, "--coder", "fp8", "--key-bias", "60")) == 2
    assert "is of other settings (key_bias): give another --out" in capsys.readouterr().err

    (tmp_path / "kv-study.png").unlink()
    assert kv_study_command.main(["--plot", str(tmp_path / "kv-study.json")]) == 0
    assert (tmp_path / "kv-study.png").exists()


def test_a_coder_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def refuse(self, layer, key, value, run):
        raise ParetoError("this shape is not served")

    monkeypatch.setattr("kv_cache.simulate.kivi.Kivi.code", refuse)
    assert kv_study_command.main(arguments(tmp_path, "--coder", "kivi2_g32", "fp8")) == 0
    failed = read_report(tmp_path / "kv-study.json").coders[1]
    assert (failed.error, failed.kl) == ("this shape is not served", None)
    assert "not measured: this shape is not served" in capsys.readouterr().out


def test_output_that_is_not_finite_is_an_error_not_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "kv_cache.simulate.kivi.Kivi.code", lambda self, layer, key, value, run: Decoded(key / 0, value)
    )
    assert kv_study_command.main(arguments(tmp_path, "--coder", "kivi2_g32")) == 0
    assert "not finite" in read_report(tmp_path / "kv-study.json").coders[0].error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "which MODEL"),
        (["no-such-model"], "not found"),
        (["ref-7m", "--coder", "int5"], "no coder is named 'int5'"),
        (["ref-7m", "--num-windows", "0"], "--num-windows must be at least 1"),
        (["ref-7m", "--window-tokens", "1"], "--window-tokens must be at least 2"),
        (["ref-7m", "--calibration-tokens", "4"], "--calibration-tokens must be at least 16"),
        (["ref-7m", "--window-tokens", "9000"], "exceed the model's 8192 positions"),
        (["ref-7m", "--value-outlier", "0"], "--value-outlier must be above 0"),
        (["ref-7m", "--device", "nonsense"], "--device nonsense"),
        (["ref-7m", "--calibration", "missing.txt"], "missing.txt"),
        (["--plot", "missing.json"], "missing.json is missing or no result"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert kv_study_command.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("kv-study: error: ")
    assert message in error


def test_a_damaged_result_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "kv-study.json").write_text('{"schema": "vllm-pareto/kv-st')
    assert kv_study_command.main(arguments(tmp_path, "--coder", "fp8")) == 2
    assert "is damaged" in capsys.readouterr().err


def test_lines_say_what_is_going_on_and_end_with_it():
    lines = []
    with kv_study_run.progress_lines(lines.append, every=0.05) as running:
        running.begin("coder 1 of 2, fp8")
        time.sleep(0.4)
    assert kv_study_run.EVERY == 10
    assert len(lines) >= 2
    assert set(lines) <= {"kv-study: coder 1 of 2, fp8, for 0 s", "kv-study: coder 1 of 2, fp8, for 1 s"}
    time.sleep(0.2)
    ended = len(lines)
    time.sleep(0.3)
    assert len(lines) == ended


@pytest.mark.long
def test_it_runs_from_a_bare_checkout(tmp_path):
    """Without vLLM, the compiled extension, rich and matplotlib, as on a machine with PyTorch and transformers only."""
    missing = ("vllm", "matplotlib", "rich", "kv_cache._cpu", "compressed_tensors", "locust", "jinja2")
    script = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        f"from bench.kv_study.command import main\nsys.exit(main({arguments(tmp_path, '--coder', 'fp8')}))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no picture: drawing needs matplotlib" in result.stderr
    assert json.loads((tmp_path / "kv-study.json").read_text())["status"] == "complete"
