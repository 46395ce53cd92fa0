"""compress(): what it writes, that an interrupted run resumes to the same bytes, and what it refuses."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from kv_cache.errors import ParetoError
from kv_cache.scales import KVScales
from quant_methods import run as run_module
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import read_tensors, unpack_linear, write_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.compress import compress
from quant_methods.formats.native_format import NativeConfig
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.rtn import RTN
from quant_methods.methods.trellis import Trellis
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import RoundStep, Step
from tests.quant_methods.random_layers import Parts

CALIBRATION = Calibration(num_samples=6, length=32, seed=3)


def recipe(*steps: Step, **changes: Any) -> Recipe:
    given = Recipe("test", steps=steps, calibration=CALIBRATION, kv_scales=False)
    return dataclasses.replace(given, **changes)


W4 = GPTQ(bits=4, group_size=64, symmetric=False)


def contents(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a directory tree."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize(
    "step",
    [
        W4,
        GPTQ(bits=4, group_size=-1, symmetric=True, act_order=False, upstream=False),
        RTN(bits=4, group_size=32, symmetric=False),
        RTN(bits=8, group_size=64, symmetric=True),
    ],
    ids=lambda step: f"{step.method}-w{step.bits}-g{step.group_size}",
)
def test_compressed_tensors_reads_back_what_was_written(
    tiny_model: Path, text_file: Path, tmp_path: Path, step: Any
) -> None:
    report = compress(tiny_model, recipe(step), tmp_path / "out", text=text_file)
    tensors, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs.model_validate(group["weights"]))
    assert len(report.layers) == 21
    for layer in report.layers:
        parts = {k.removeprefix(layer.name + "."): v for k, v in tensors.items() if k.startswith(layer.name + ".")}
        theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"].float()
        ours = unpack_linear(layer.name, tensors, step.grid).read()
        # They multiply in the scale's dtype.
        assert torch.allclose(theirs, ours, rtol=2**-7, atol=0)
        assert tuple(ours.shape) == layer.shape
    assert config["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in tensors, "tied embeddings stay tied"
    stored = sum(
        t.numel() * t.element_size() for n, t in tensors.items() if n.startswith("model.layers.") and "norm" not in n
    )
    shapes = len(report.layers) * 16
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    # Zero-points are packed in whole int32s, so a little more may be stored than the report's bits say.
    assert report.bits_per_weight == pytest.approx(8 * (stored - shapes) / weights, rel=0.01)
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in tensors.values())


def test_weights_are_close_to_the_original(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    report = compress(tiny_model, recipe(W4), tmp_path / "w4", text=text_file)
    eight = compress(
        tiny_model, recipe(dataclasses.replace(W4, bits=8, symmetric=True)), tmp_path / "w8", text=text_file
    )
    assert all(0 < layer.relative_error < 0.2 for layer in report.layers)
    assert all(0 < layer.relative_error < 0.03 for layer in eight.layers)


def test_int8_activations_use_the_int_quantized_layout(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    step = RTN(bits=8, group_size=-1, symmetric=True, activations="int8")
    report = compress(tiny_model, recipe(step), tmp_path / "out", text=text_file)
    tensors, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert tensors[f"{name}.weight"].dtype == torch.int8
    original, _ = read_tensors(tiny_model / "model.safetensors")
    read = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"].float()
    assert torch.allclose(read, original[f"{name}.weight"].float(), atol=0.02 * original[f"{name}.weight"].abs().max())
    assert str(report.serving) == "stock vLLM on CPU and CUDA"


def test_static_scales_are_those_of_the_inputs(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    step = RTN(bits=8, group_size=-1, symmetric=True, activations="int8_static")
    report = compress(tiny_model, recipe(step), tmp_path / "out", text=text_file)
    assert str(report.serving) == "stock vLLM on CUDA"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert (group["input_activations"]["dynamic"], group["input_activations"]["strategy"]) == (False, "tensor")

    tensors, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    scales = {key.removesuffix(".input_scale"): t for key, t in tensors.items() if key.endswith(".input_scale")}
    assert len(scales) == 21
    assert all(scale.dtype == torch.float32 and scale.shape == (1,) for scale in scales.values())
    layer = "model.layers.1.self_attn."
    assert scales[f"{layer}q_proj"] == scales[f"{layer}k_proj"] == scales[f"{layer}v_proj"] != scales[f"{layer}o_proj"]

    # What serving computes with them is near the original, and each lies within reach of its inputs' largest.
    tokens = load_sequences(tiny_model, text_file, 4, 64)
    original, served = load_reference(tiny_model), load_reference(tmp_path / "out")
    seen: dict[str, float] = {}
    for name in scales:
        original.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].abs().max().item())
        )
    with torch.no_grad():
        base, found = (model(tokens).logits.log_softmax(-1) for model in (original, served))
    assert 0 < (base.exp() * (base - found)).sum(-1).mean() < 0.05
    for name, scale in scales.items():
        assert 0.3 * seen[name] < 127 * scale.item() < 1.1 * seen[name]


def test_other_files_and_provenance_travel_along(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    compress(tiny_model, recipe(W4), tmp_path / "out", text=text_file)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_model / name).read_bytes()
    provenance = json.loads((tmp_path / "out" / RECIPE_FILE).read_text())
    assert provenance["recipe"]["steps"][0]["method"] == "gptq"
    assert provenance["calibration"]["seed"] == 3
    assert set(provenance["versions"]) >= {"torch", "transformers", "compressed-tensors", "vllm-pareto"}
    assert not (tmp_path / "out.partial").exists()


class Interrupted(Exception):
    """Stands for Ctrl-C at a chosen moment."""


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("block 1/3: mlp.down_proj", marks=pytest.mark.long),
        "block 2/3",
        pytest.param("block 3/3: running", marks=pytest.mark.long),
        "writing the checkpoint",
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path, moment: str
) -> None:
    given = recipe(W4, kv_scales=True)
    compress(tiny_model, given, tmp_path / "whole", text=text_file)

    def interrupt(done: int, total: int, what: str) -> None:
        if what == moment:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(tiny_model, given, tmp_path / "out", text=text_file, progress=interrupt)
    assert not (tmp_path / "out").exists()
    report = compress(tiny_model, given, tmp_path / "out", text=text_file)
    finished = {"block 1/3: mlp.down_proj": 0, "block 2/3": 1, "block 3/3: running": 3, "writing the checkpoint": 3}
    assert report.resumed_blocks == finished[moment]
    assert len(report.layers) == 21
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_process_resumes(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from quant_methods.compress import compress
from tests_recipe import given
compress({str(tiny_model)!r}, given, {str(tmp_path / "out")!r}, text={str(text_file)!r},
         progress=lambda done, total, what: os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None)
"""
    (tmp_path / "tests_recipe.py").write_text(
        "from quant_methods.recipe import Calibration, Recipe\nfrom quant_methods.methods.rtn import RTN\n"
        "steps = (RTN(bits=4, group_size=32),)\n"
        "given = Recipe('test', steps=steps, calibration=Calibration(6, 32, 3), kv_scales=False)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    report = compress(tiny_model, recipe(RTN(bits=4, group_size=32)), tmp_path / "out", text=text_file)
    assert report.resumed_blocks == 2


def test_an_unfinished_run_of_something_else_is_refused(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(tiny_model, recipe(W4), tmp_path / "out", text=text_file, progress=interrupt)
    other = recipe(dataclasses.replace(W4, group_size=32))
    with pytest.raises(ParetoError, match=r"out\.partial holds an unfinished run .* different recipe; .*--overwrite"):
        compress(tiny_model, other, tmp_path / "out", text=text_file)
    report = compress(tiny_model, other, tmp_path / "out", text=text_file, overwrite=True)
    assert report.resumed_blocks == 0
    compress(tiny_model, other, tmp_path / "fresh", text=text_file)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_seeds_decide_the_samples(tiny_model: Path, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, str]:
        calibration = Calibration(num_samples=3, length=16, seed=seed)
        compress(tiny_model, recipe(W4, calibration=calibration), tmp_path / name)
        return contents(tmp_path / name)

    first, again, other = run("a", 1), run("b", 1), run("c", 2)
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


def test_kv_scales_alone_copies_the_weights(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    given = recipe(kv_scales=True)
    report = compress(tiny_model, given, tmp_path / "out", text=text_file)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / "model.safetensors").samefile(tiny_model / "model.safetensors"), "edits stay apart"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    scales = KVScales.load(tmp_path / "out")
    assert [scales.shape(index) for index in range(scales.num_layers)] == [(1, 64)] * 3
    assert report.bytes_after == report.bytes_before


def test_kv_scales_of_a_quantized_checkpoint_are_those_of_the_weights_it_means(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    for bits, form in ((4, "compressed-tensors"), (3, "pareto")):
        coarse = RTN(bits=bits, group_size=-1, symmetric=bits == 4, search="minmax")
        compress(tiny_model, recipe(coarse), tmp_path / form, text=text_file)
        compress(tmp_path / form, recipe(kv_scales=True), tmp_path / f"{form}-kv", text=text_file)
        shutil.copytree(tiny_model, tmp_path / f"{form}-read")
        load_reference(tmp_path / form).save_pretrained(tmp_path / f"{form}-read")
        compress(tmp_path / f"{form}-read", recipe(kv_scales=True), tmp_path / f"{form}-expected", text=text_file)
        found, expected = (KVScales.load(tmp_path / f"{form}-{end}").layers for end in ("kv", "expected"))
        for layer, same in zip(found, expected, strict=True):
            assert (layer.key_mean - same.key_mean).norm() < 0.01 * same.key_mean.norm()
            assert torch.allclose(layer.value_size, same.value_size, rtol=0.01)
        kept = {path.name: path.read_bytes() for path in (tmp_path / form).glob("*.safetensors")}
        assert kept == {path.name: path.read_bytes() for path in (tmp_path / f"{form}-kv").glob("*.safetensors")}
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in (form, f"{form}-kv")]
        assert configs[0] == configs[1]


def test_kv_scales_alone_need_no_text(tiny_model: Path, tmp_path: Path) -> None:
    given = dataclasses.replace(recipe(kv_scales=True), calibration=Calibration(num_samples=4, length=64))
    compress(tiny_model, given, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "pareto_recipe.json").read_text())["calibration"]
    assert described["source"] == "the text that ships with vllm-pareto"
    assert (described["num_samples"], described["length"]) == (4, 64)
    assert KVScales.load(tmp_path / "out").metadata["calibration_tokens"] == 4 * 64 + 256


def test_kv_scales_see_the_quantized_model(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    compress(tiny_model, recipe(kv_scales=True), tmp_path / "plain", text=text_file)
    coarse = RTN(bits=4, group_size=-1, symmetric=True, search="minmax")
    compress(tiny_model, recipe(coarse, kv_scales=True), tmp_path / "w4", text=text_file)
    plain, quantized = (KVScales.load(tmp_path / name).layer(0) for name in ("plain", "w4"))
    assert not torch.equal(plain.value_size, quantized.value_size)
    assert torch.allclose(plain.value_size, quantized.value_size, rtol=0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (recipe(), "nothing to do"),
        (recipe(RTN(), ignore=("*",)), "nothing to compress"),
        (
            recipe(RTN(group_size=128, group_size_fallback="refuse")),
            r"group size 128 does not divide the 192 input channels of .*down_proj; .* 32, 64",
        ),
        (recipe(RTN(group_size=64), ignore=("k_proj",)), r"q_proj and .*k_proj would be stored differently"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_any_work(
    tiny_model: Path, text_file: Path, tmp_path: Path, given: Recipe, message: str
) -> None:
    with pytest.raises(ParetoError, match=message):
        compress(tiny_model, given, tmp_path / "out", text=text_file)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_existing_output_is_kept_unless_told(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ParetoError, match="out exists; give --overwrite"):
        compress(tiny_model, recipe(RTN(group_size=64)), out, text=text_file)
    assert (out / "precious.txt").read_text() == "mine"
    with pytest.raises(ParetoError, match=r"no checkpoint that pareto wrote \(it has precious\.txt"):
        compress(tiny_model, recipe(RTN(group_size=64)), out, text=text_file, overwrite=True)
    assert (out / "precious.txt").read_text() == "mine"
    (out / "precious.txt").unlink()
    compress(tiny_model, recipe(RTN(group_size=64)), out, text=text_file)
    compress(tiny_model, recipe(RTN(group_size=32)), out, text=text_file, overwrite=True)
    assert json.loads((out / RECIPE_FILE).read_text())["recipe"]["steps"][0]["group_size"] == 32


def test_a_full_disk_is_one_clear_line(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "write_tensors", full)
    with pytest.raises(ParetoError, match="the disk is full; free some space and run the same command"):
        compress(tiny_model, recipe(RTN(group_size=64)), tmp_path / "out", text=text_file)


def test_ignored_layers_keep_their_bytes(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    compress(
        tiny_model,
        recipe(RTN(group_size=64), ignore=("lm_head", "*.1.mlp.down_proj")),
        tmp_path / "out",
        text=text_file,
    )
    tensors, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    original, _ = read_tensors(tiny_model / "model.safetensors")
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], original["model.layers.1.mlp.down_proj.weight"])
    assert "model.layers.0.mlp.down_proj.weight" not in tensors
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["model.layers.1.mlp.down_proj", "lm_head"]


def test_what_stock_vllm_cannot_serve_is_stored_in_our_format(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """One layer that needs our format takes all others along; the reader gets what the block solver had."""
    steps = (
        RTN(bits=3, group_size=32, symmetric=False, search="minmax", targets=("down_proj",)),
        RTN(bits=4, group_size=64, search="minmax"),
    )
    report = compress(tiny_model, recipe(*steps), tmp_path / "out", text=text_file)
    assert str(report.serving) == "vLLM with this plugin on CPU and CUDA"
    tensors, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    forms = NativeConfig.parse(config).forms
    assert {name: form.bulk.bits for name, form in forms.items()} == {
        layer.name: 3 if "down_proj" in layer.name else 4 for layer in report.layers
    }
    assert config["ignore"] == ["lm_head"]
    stored = sum(
        t.numel() * t.element_size() for n, t in tensors.items() if n.startswith("model.layers.") and "norm" not in n
    )
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert report.bits_per_weight == pytest.approx(8 * stored / weights)
    state = load_reference(tmp_path / "out").state_dict()
    original = load_reference(tiny_model).state_dict()
    for layer in report.layers:
        error = (state[f"{layer.name}.weight"] - original[f"{layer.name}.weight"]).norm()
        assert 0 < error / original[f"{layer.name}.weight"].norm() < (0.4 if "down_proj" in layer.name else 0.2)


@pytest.mark.usefixtures("parts_handled")
@pytest.mark.parametrize(
    "step",
    [
        Parts(bits=3, group_size=64, symmetric=False, columns=2, column_bits=8, sparse=True),
        pytest.param(Trellis(bits=3, group_size=32), marks=pytest.mark.long),
    ],
    ids=["grid", "trellis"],
)
def test_an_interrupted_run_of_our_format_writes_the_same_bytes(
    tiny_model: Path, text_file: Path, tmp_path: Path, step: RoundStep
) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Interrupted

    compress(tiny_model, recipe(step), tmp_path / "whole", text=text_file)
    with pytest.raises(Interrupted):
        compress(tiny_model, recipe(step), tmp_path / "out", text=text_file, progress=interrupt)
    assert compress(tiny_model, recipe(step), tmp_path / "out", text=text_file).resumed_blocks == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "step",
    [
        RTN(bits=3, group_size=-1, symmetric=False, search="minmax"),
        RTN(bits=4, group_size=-1, symmetric=False, search="minmax"),
        RTN(bits=8, group_size=-1, symmetric=True, search="mse", activations="int8"),
    ],
    ids=["ours", "pack-quantized", "int-quantized"],
)
def test_a_compression_that_changes_nothing_is_an_error(
    tiny_model: Path, text_file: Path, tmp_path: Path, step: RTN
) -> None:
    """Weights that lie on the grid already read back as they were: the original was compressed before."""
    rounded = tmp_path / "rounded"
    shutil.copytree(tiny_model, rounded)
    tensors, metadata = read_tensors(rounded / "model.safetensors")
    high = (1 << (step.bits - 1)) - 1
    low = -high if step.symmetric else -high - 1
    for name, tensor in tensors.items():
        if "_proj" in name:
            codes = torch.randint(low, high + 1, tensor.shape)
            codes[:, :2] = torch.tensor([low, high])
            tensors[name] = codes.to(torch.bfloat16) / 64
    write_tensors(rounded / "model.safetensors", tensors, metadata)
    with pytest.raises(ParetoError, match="no-op: every weight of rounded reads back exactly as it was"):
        compress(rounded, recipe(step), tmp_path / "out", text=text_file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [W4, RTN(bits=3, group_size=64)], ids=["standard", "ours"])
def test_codes_that_would_not_be_used_are_an_error(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step
) -> None:
    def forget(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        kept = {name: t for name, t in tensors.items() if not name.startswith("model.layers.1.mlp.up_proj.weight_p")}
        write_tensors(path, kept, metadata)

    monkeypatch.setattr(run_module, "write_tensors", forget)
    with pytest.raises(ParetoError, match=r"no-op: model\.layers\.1\.mlp\.up_proj was quantized, and the checkpoint"):
        compress(tiny_model, recipe(step), tmp_path / "out", text=text_file)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("parts_handled")
def test_a_step_that_hides_its_parts_is_refused(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parts, "plain", True)
    with pytest.raises(ParetoError, match="made a low-rank product, which compressed-tensors has no place for"):
        compress(tiny_model, recipe(Parts(bits=4, group_size=64, rank=1)), tmp_path / "out", text=text_file)
