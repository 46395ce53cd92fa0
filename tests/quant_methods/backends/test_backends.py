"""Other tools: our recipe in their words, their environments, and a tool that does its work well, badly or never."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.backends import check as backend_check
from quant_methods.backends import environment as backend_environment
from quant_methods.backends import run as backend_run
from quant_methods.backends.environment import BACKENDS, READY, RUNNERS, Backend, environment_python
from quant_methods.backends.run import compress_with, older_config
from quant_methods.backends.settings import tool_settings
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.pruning import Wanda
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Calibration, Recipe
from quant_methods.recipe_file import built_in_recipes, load_recipe
from quant_methods.steps import Step
from vllm_ext.cli import main

SMALL = Calibration(num_samples=2, length=64)
STEP = RTN(bits=4, group_size=32, symmetric=True)
HONEST = Recipe("honest", steps=(STEP,), calibration=SMALL, kv_scales=False)

# A tool in forty lines: rounds to nearest, in the GPTQ layout. The seed in its job says how it behaves.
TOOL = """
import json, pathlib, shutil, sys
from runner_job import Job

job = Job()
out = pathlib.Path(job["out"])
if job["seed"] == 3:
    print("RuntimeError: the tool ran out of ideas")
    sys.exit(1)
if job["seed"] == 2:
    shutil.copytree(job["model"], out)
    pathlib.Path(job["result"]).write_text(json.dumps({"versions": {}}))
    sys.exit()
import torch
from safetensors.torch import load_file, save_file

assert job.tokens() is None  # rounding to nearest needs no data
job.start_clock()
source = load_file(pathlib.Path(job["model"]) / "model.safetensors")
tensors = {}
for number, (name, weight) in enumerate(source.items()):
    job.tell("layers", number, len(source))
    if not name.endswith("_proj.weight") or (job["seed"] == 4 and "layers.1.mlp.up" in name):
        tensors[name] = weight
        continue
    groups = weight.float().T.unflatten(0, (-1, job["group_size"]))
    scale = (groups.abs().amax(1) / 7.5).half()
    codes = (groups / scale[:, None].float()).round().clamp(-8, 7).flatten(0, 1).long() + 8
    if job["seed"] == 1:
        codes = codes.roll(1, 1)
    words = sum(codes[place::8] << (4 * place) for place in range(8))
    local = name.removesuffix("weight")
    tensors[local + "qweight"] = (((words + 2**31) % 2**32) - 2**31).to(torch.int32).contiguous()
    tensors[local + "qzeros"] = torch.full((len(scale), weight.shape[0] // 8), 0x77777777, dtype=torch.int32)
    tensors[local + "scales"] = scale
out.mkdir()
save_file(tensors, out / f"gptq_model-4bit-{job['group_size']}g.safetensors", {"format": "pt"})
config = json.loads((pathlib.Path(job["model"]) / "config.json").read_text())
(out / "config.json").write_text(json.dumps(config))
(out / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": job["group_size"]}))
job.finish(["torch"], ["nothing was changed"])
"""


# And one that drops the smallest weights; with seed 1 too few of them, with seed 2 the largest.
PRUNING_TOOL = """
import pathlib, shutil
from runner_job import Job

job = Job()
import torch
from safetensors.torch import load_file, save_file

assert job["rounding"] is None and job["prune"] == "wanda" and len(job.tokens()) == 2
job.start_clock()
source = load_file(pathlib.Path(job["model"]) / "model.safetensors")
among = 4 if job["pattern"] == "2:4" else 32
drop = round(among * job["sparsity"]) - (job["seed"] == 1)
for name, weight in source.items():
    if name.endswith("_proj.weight"):
        groups = weight.unflatten(1, (-1, among))
        worst = groups.abs().topk(drop, largest=job["seed"] == 2).indices
        source[name] = groups.scatter(2, worst, 0).flatten(1)
out = pathlib.Path(job["out"])
out.mkdir()
save_file(source, out / "model.safetensors", {"format": "pt"})
shutil.copyfile(pathlib.Path(job["model"]) / "config.json", out / "config.json")
job.finish(["torch"], [])
"""


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    folder = tmp_path_factory.mktemp("tool")
    shutil.copyfile(RUNNERS / "runner_job.py", folder / "runner_job.py")
    (folder / "runner.py").write_text(TOOL)
    return Backend("tool", "torch", str(folder / "runner.py"), "rtn-w4", ((None, "rtn"),), bits=(4,), symmetric=(True,))


@pytest.fixture(scope="module")
def pruning_tool(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    folder = tmp_path_factory.mktemp("pruning-tool")
    shutil.copyfile(RUNNERS / "runner_job.py", folder / "runner_job.py")
    (folder / "runner.py").write_text(PRUNING_TOOL)
    return Backend("tool", "torch", str(folder / "runner.py"), "", (), (), (), prunes=("wanda",))


def seeded(behaviour: int) -> Recipe:
    return Recipe("rtn", steps=(STEP,), calibration=Calibration(2, 64, seed=behaviour), kv_scales=False)


def test_an_honest_tool_is_checked_and_recorded(
    tool: Backend, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    said = []
    out = tmp_path / "out"
    report = compress_with(
        tool, tiny_model, seeded(0), out, text=text_file, python=Path(sys.executable),
        progress=lambda *words: said.append(words),
    )  # fmt: skip
    assert report.layers == 21
    # 4 bits, and for every 32 weights a scale of 16 and a zero-point of 4.
    assert report.bits_per_weight == pytest.approx(4 + 20 / 32)
    assert 0 < report.divergence < 1.5 * report.divergence_plain
    assert any(what == "tool: layers" and 0 < done < total for done, total, what in said)
    made = json.loads((out / "pareto_recipe.json").read_text())
    assert made["backend"]["versions"]["torch"] == torch.__version__
    assert made["backend"]["shims"] == ["nothing was changed"]
    assert made["backend"]["check"]["kl"] == report.divergence
    assert (out / "tokenizer.json").is_file()
    assert not out.with_name("out.partial").exists()
    # What it means is what our own rounding to nearest of the same layout means, up to half-precision scales.
    compress(tiny_model, Recipe("ours", steps=(RTN(4, 32, True, search="minmax"),), kv_scales=False), tmp_path / "ours")
    theirs, ours = (load_reference(folder).model.layers[2].mlp.up_proj.weight for folder in (out, tmp_path / "ours"))
    assert (theirs - ours).abs().max() < 0.2 * ours.abs().max()
    assert torch.nn.functional.cosine_similarity(theirs.flatten(), ours.flatten(), 0) > 0.99
    with pytest.raises(ParetoError, match=r"already quantized \(gptq\); compress the original"):
        compress(out, HONEST, tmp_path / "again")


@pytest.mark.parametrize("pattern", ["any", "2:4"])
def test_a_tool_that_prunes_writes_a_dense_checkpoint_with_zeros(
    pattern: str, pruning_tool: Backend, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe("w", steps=(Wanda(0.5, pattern),), calibration=SMALL, kv_scales=False)
    out = tmp_path / "out"
    report = compress_with(pruning_tool, tiny_model, recipe, out, text=text_file, python=Path(sys.executable))
    assert (report.layers, report.bits_per_weight) == (21, 16)
    assert report.sparsity == pytest.approx(0.5, abs=0.005)
    assert 0 < report.divergence < 2 * report.divergence_plain
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    weight = load_reference(out).model.layers[1].mlp.down_proj.weight
    if pattern == "2:4":
        assert ((weight == 0).unflatten(1, (-1, 4)).sum(2) >= 2).all()


@pytest.mark.parametrize(
    ("behaviour", "message"), [(1, "has 46.9% zeros; the recipe asks for 50%"), (2, "tool wrote corrupt weights")]
)
def test_a_bad_tool_that_prunes_is_reported(
    behaviour: int, message: str, pruning_tool: Backend, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration = Calibration(2, 64, seed=behaviour)
    recipe = Recipe("w", steps=(Wanda(0.5),), calibration=calibration, kv_scales=False)
    with pytest.raises(ParetoError, match=message):
        compress_with(pruning_tool, tiny_model, recipe, tmp_path / "out", text=text_file, python=Path(sys.executable))


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (1, "tool wrote corrupt weights: KL to the original"),
        (2, "tool wrote an unquantized checkpoint"),
        (3, "tool failed: RuntimeError: the tool ran out of ideas"),
        (4, "tool: model.layers.1.mlp.up_proj was left unquantized"),
    ],
)
def test_a_bad_tool_is_reported(
    behaviour: int, message: str, tool: Backend, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ParetoError, match=message):
        compress_with(tool, tiny_model, seeded(behaviour), out, text=text_file, python=Path(sys.executable))
    assert not out.exists()
    with pytest.raises(ParetoError, match="holds an unfinished run of something else"):
        compress_with(tool, tiny_model, seeded(9), out, text=text_file, python=Path(sys.executable))


def test_an_interrupted_check_goes_on_without_the_tool(
    tool: Backend, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, runs = tmp_path / "out", []
    run_tool = backend_run._run_tool

    def counted(*words: Any) -> None:
        runs.append(words)
        run_tool(*words)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend_run, "_run_tool", counted)
    with monkeypatch.context() as patch:
        patch.setattr(backend_check, "check_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress_with(tool, tiny_model, seeded(0), out, text=text_file, python=Path(sys.executable))
    assert compress_with(tool, tiny_model, seeded(0), out, text=text_file, python=Path(sys.executable)).layers == 21
    assert len(runs) == 1


def test_recipes_in_the_words_of_the_tools() -> None:
    found = tool_settings(BACKENDS["llm-compressor"], load_recipe("smoothquant-w8a8"))
    assert (found["transform"], found["rounding"], found["activations"]) == ("smoothquant", "gptq", "int8")
    assert (found["bits"], found["group_size"], found["symmetric"], found["alpha"]) == (8, -1, True, None)
    assert tool_settings(BACKENDS["autoawq"], load_recipe("awq-w4"))["group_size"] == 128
    assert tool_settings(BACKENDS["autogptq"], load_recipe("gptq-w4"))["act_order"] is True
    pruned = tool_settings(BACKENDS["llm-compressor"], load_recipe("sparsegpt-2of4"))
    assert (pruned["prune"], pruned["sparsity"], pruned["pattern"], pruned["prune_damping"]) == (
        "sparsegpt", 0.5, "2:4", 0.01,
    )  # fmt: skip
    assert (pruned["rounding"], pruned["transform"]) == (None, None)
    both = Recipe("both", steps=(Wanda(0.5), GPTQ(bits=4, group_size=64)))
    found = tool_settings(BACKENDS["llm-compressor"], both)
    assert (found["prune"], found["rounding"], found["group_size"]) == ("wanda", "gptq", 64)
    for backend in BACKENDS.values():
        assert backend.recipe in built_in_recipes()
        tool_settings(backend, load_recipe(backend.recipe))


@pytest.mark.parametrize(
    ("backend", "recipe", "message"),
    [
        ("autoawq", "gptq-w4", "autoawq cannot do gptq; it does: awq then rtn"),
        ("autogptq", "awq-w4", "autogptq cannot do awq then rtn; it does: gptq"),
        ("autogptq", "gptq-w8", "autogptq does not round activations to int8"),
        ("llm-compressor", "quarot-gptq-w4", "llm-compressor cannot do rotate then gptq"),
        ("llm-compressor", "kv-scales", "llm-compressor cannot do no step"),
        ("llm-compressor", "sparsegpt-2of4-w4", "does not round while it prunes; leave bits out and let gptq follow"),
        ("autogptq", "wanda-50", "autogptq cannot do wanda; it does: gptq"),
    ],
)
def test_what_a_tool_cannot_do_is_refused(backend: str, recipe: str, message: str) -> None:
    with pytest.raises(ParetoError, match=message):
        tool_settings(BACKENDS[backend], load_recipe(recipe))


@pytest.mark.parametrize("steps", [(AWQ(), Wanda(0.5), STEP), (Wanda(0.5), AWQ(), STEP), (Wanda(0.5), Wanda(0.5))])
def test_a_prune_step_comes_first_and_alone_or_before_a_rounding(steps: tuple[Step, ...]) -> None:
    with pytest.raises(ParetoError, match="sparsegpt, alone or before a rounding; wanda, alone or before a rounding"):
        tool_settings(BACKENDS["llm-compressor"], Recipe("r", steps=steps))


def test_older_transformers_are_told_the_rotary_base() -> None:
    config = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert older_config(config, Path("m")) == {"torch_dtype": "bfloat16", "rope_theta": 5e5}
    scaled = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
    assert older_config(scaled, Path("m")) == {
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    with pytest.raises(ParetoError, match="differ between layers"):
        older_config({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, Path("m"))


def test_an_environment_is_made_once_and_only_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    backend, said, commands = BACKENDS["autogptq"], [], []
    broken = True

    def run(command: list[str], *_: object) -> None:
        commands.append(command)
        if "venv" in command:
            Path(command[-1], "bin").mkdir(parents=True)
        elif broken and "--no-build-isolation" in command:
            raise ParetoError("no room left")

    monkeypatch.setattr(backend_environment, "_run", run)

    def python(*, create: bool) -> Path:
        return environment_python(backend, "cpu", None, create=create, progress=lambda *words: said.append(words))

    with pytest.raises(
        ParetoError, match=r"--create-environment makes one in .*autogptq-0\.7\.1 and installs auto-gptq"
    ):
        python(create=False)
    assert not commands
    with pytest.raises(ParetoError, match="no room left"):
        python(create=True)
    with pytest.raises(ParetoError, match="has no environment yet"):
        python(create=False)
    broken = False
    assert python(create=True) == tmp_path / "backends" / "autogptq-0.7.1" / "bin" / "python"
    installed = [word for word in commands[-1] if "==" in word]
    assert "peft==0.11.1" in installed
    assert not any(word.startswith("torch==") for word in installed)
    assert "--no-deps" in commands[-1]
    count = len(commands)
    assert python(create=False).parent.parent.joinpath(READY).is_file()
    python(create=True)
    assert len(commands) == count
    # Another list of packages is another environment.
    python(create=False).parent.parent.joinpath(READY).write_text("an older list")
    with pytest.raises(ParetoError, match="has no environment yet"):
        python(create=False)


def test_runners_and_locks_stand_alone() -> None:
    for backend in BACKENDS.values():
        pins = backend.pins()
        assert {"torch", "transformers", "safetensors", "tqdm", backend.package} <= set(pins)
        tree = ast.parse((RUNNERS / backend.runner).read_text())
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not {name.partition(".")[0] for name in imported} & {"quant_methods", "kv_cache", "vllm_ext", "bench"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--create-environment"], "--create-environment is for --backend, one of llm-compressor"),
        (["--backend", "autoawq", "--refit"], "--refit: autoawq has no such thing"),
        (["--backend", "autoawq", "--search", "mse"], "--search: autoawq has no such thing"),
        (["--backend", "autoawq", "--kv-scales"], "--kv-scales: autoawq has no such thing"),
        (["--backend", "autoawq", "--symmetric"], "autoawq writes 4-bit codes with zero-points only"),
        (["--backend", "autoawq", "--backend-python", sys.executable], "autoawq is not installed there"),
        (["--backend", "autoawq", "--backend-python", "missing"], "missing: not a Python that runs"),
        (["--backend", "llm-compressor"], "llm-compressor has no environment yet"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "Popen", _no_process) if "--backend-python" not in words else None
    assert main(["compress", "--out", str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def _no_process(*_: object, **__: object) -> None:
    raise AssertionError("nothing may be started before the input is right")
