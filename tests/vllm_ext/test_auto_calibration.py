"""Scales made when a server starts: once, kept, and with honest errors. No engine is started."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_cache.errors import ParetoError
from kv_cache.scales import SCALES_FILE, KVScales
from quant_methods import kv_scales
from vllm_ext import auto_calibration
from vllm_ext.auto_calibration import Origin, calibrate

TOKENIZER = Path(__file__).parents[2] / "quant_methods" / "models" / "ref-7m"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model of one block with the reference model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, head_dim=64, vocab_size=8192,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, tmp_path / "model" / name)
    return tmp_path / "model"


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate here: the first test shows a process that does, and starting each takes seconds."""

    class Here:
        def __init__(self, command: list[str], **how: Any) -> None:
            assert command[:3] == [sys.executable, "-m", "quant_methods.kv_scales"]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                self.returncode = kv_scales.main(command[3:])
            self.stdout = printed.getvalue().splitlines()

        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *raised: object) -> None: ...

    stands_in = SimpleNamespace(Popen=Here, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(auto_calibration, "subprocess", stands_in)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # The command sets it too.


def test_a_model_is_calibrated_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = calibrate(Origin(str(model)), device="cpu")
    assert KVScales.load(folder).head_dim == 64
    said = capsys.readouterr().err.splitlines()
    assert "has no calibrated KV scales; calibrating on a short text on cpu" in said[0]
    assert all(line.startswith("pareto: KV scales: ") for line in said[1:-1])
    assert "done in" in said[-2]
    assert said[-1] == f"pareto: KV scales kept in {folder}"
    assert sorted(path.name for path in folder.iterdir()) == ["kv_scales", "lock"]
    monkeypatch.setattr(subprocess, "Popen", None)
    assert calibrate(Origin(str(model)), device="cpu") == folder
    assert not capsys.readouterr().err
    # Another model, or another way of calibrating, has scales of its own.
    changed = load_file(model / "model.safetensors")
    changed["model.layers.0.self_attn.k_proj.weight"] *= 2
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(TypeError):
        calibrate(Origin(str(model)), device="cpu")
    changed["model.layers.0.self_attn.k_proj.weight"] /= 2
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    for name, value in (("REVISION", 10**6), ("SCHEMA", "vllm-pareto/kv-scales/other")):
        with monkeypatch.context() as patch:
            patch.setattr(auto_calibration, name, value)
            with pytest.raises(TypeError):
                calibrate(Origin(str(model)), device="cpu")
    assert (folder / SCALES_FILE).is_file()


@pytest.mark.usefixtures("no_process")
def test_the_model_is_calibrated_as_it_is_served(model: Path, tmp_path: Path) -> None:
    plain = calibrate(Origin(str(model)), device="cpu")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"rope_scaling": scaling, "max_position_embeddings": 256}
    stretched = calibrate(Origin(str(model), overrides=json.dumps(changes)), device="cpu")
    rotary, before = (KVScales.load(folder).layer(0).rotary for folder in (stretched, plain))
    assert (before.max_position, rotary.max_position) == (64, 256)
    assert not torch.allclose(rotary.inv_freq, before.inv_freq)
    # The same, said by a config.json that lies elsewhere.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = json.loads((model / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps(config | changes))
    assert calibrate(Origin(str(model), config=str(elsewhere)), device="cpu") == stretched
    assert calibrate(Origin(str(model)), device="cpu") == plain


def test_overrides_change_a_part_entry_by_entry_and_all_else_as_a_whole() -> None:
    config = {"text_config": {"a": 1, "b": {"x": 1}}, "rope_scaling": {"factor": 2, "type": "yarn"}, "c": 3}
    auto_calibration._override(config, {"text_config": {"b": {"y": 2}}, "rope_scaling": {"factor": 4}, "d": 4})
    assert config == {"text_config": {"a": 1, "b": {"y": 2}}, "rope_scaling": {"factor": 4}, "c": 3, "d": 4}


@pytest.mark.usefixtures("no_process")
def test_what_cannot_be_calibrated_is_explained(model: Path) -> None:
    with pytest.raises(ParetoError, match=r"no/such has no calibrated KV scales, and none .*--kv-cache-dtype"):
        calibrate(Origin("./no/such"), device="cpu")
    with pytest.raises(ParetoError, match=r"whose config.json is no local file \(--hf-config-path /other\): download"):
        calibrate(Origin(str(model), config="/other"), device="cpu")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParetoError, match=r"failed \(.*k_proj.weight is not in the checkpoint.*\): use --kv-"):
        calibrate(Origin(str(model)), device="cpu")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ParetoError, match=r"failed \(.*quantized by 'hqq'; expected .*\): use --kv-cache-dtype auto"):
        calibrate(Origin(str(model)), device="cpu")
    # A model of another kind is refused at once; the command that makes scales would refuse it too.
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ParetoError, match=r"GPT2LMHeadModel is not a supported decoder .*: use --kv-") as said:
        calibrate(Origin(str(model)), device="cpu")
    assert "--recipe" not in str(said.value)
