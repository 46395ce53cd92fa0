"""``pareto serve`` refuses no model that vLLM serves, and asks for no more memory than there is."""

import argparse
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from kv_cache.errors import ParetoError
from quant_methods.embedded import MODELS
from quant_methods.model_source import validate_checkpoint
from vllm_ext import launch, serve


def find(*words):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.find_model(parser.parse_args([str(word) for word in words]))


def config(folder, architecture="FalconForCausalLM", **values):
    folder.mkdir(exist_ok=True)
    text = {"model_type": "x", "architectures": [architecture], "num_hidden_layers": 1} | values
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def test_architectures_and_formats_are_vllms_business(tmp_path):
    falcon = config(tmp_path / "falcon")
    save_file({"transformer.h.0.x": torch.zeros(2)}, falcon / "model.safetensors")
    assert find(falcon) == str(falcon)
    gpt2 = config(tmp_path / "gpt2", "GPT2LMHeadModel", n_layer=1)
    save_file({"h.0.x": torch.zeros(2)}, gpt2 / "model.safetensors")
    assert find(gpt2) == str(gpt2)
    binary = config(tmp_path / "bin", "LlamaForCausalLM")
    (binary / "pytorch_model.bin").write_bytes(b"x")
    assert find(binary) == str(binary)
    pictures = config(tmp_path / "mm", "LlavaForConditionalGeneration")
    save_file({"model.layers.0.x": torch.zeros(2)}, pictures / "model.safetensors")
    assert find(pictures) == str(pictures)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert find(tmp_path / "model.gguf") == str(tmp_path / "model.gguf")
    mistral = tmp_path / "mistral"
    mistral.mkdir()
    (mistral / "params.json").write_text("{}")
    assert find(mistral) == str(mistral)
    assert find("ref-7m") == str(MODELS / "ref-7m")
    assert find("s3://bucket/model") == "s3://bucket/model"


def test_what_no_server_starts_from_is_said_at_once(tmp_path):
    cut = config(tmp_path / "cut")
    save_file({"transformer.h.0.x": torch.zeros(200)}, cut / "model.safetensors")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ParetoError, match="is truncated"):
        find(cut)
    assert find(cut, "--load-format", "dummy") == str(cut)
    (cut / "config.json").write_text("{")
    with pytest.raises(ParetoError, match="not valid JSON"):
        find(cut)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ParetoError, match=r"no config\.json"):
        find(tmp_path / "empty")
    with pytest.raises(ParetoError, match="not found: no such directory"):
        find(tmp_path / "absent" / "model")


def test_a_config_may_lie_elsewhere(tmp_path):
    """It was once refused for a config.json that vLLM would not have read."""
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file({"transformer.h.0.x": torch.zeros(2)}, weights / "model.safetensors")
    elsewhere = config(tmp_path / "elsewhere")
    assert find(weights, "--hf-config-path", elsewhere) == str(weights)
    assert find(weights, "--hf-config-path", "org/on-the-hub") == str(weights)
    (elsewhere / "config.json").write_text("{")
    with pytest.raises(ParetoError, match=r"elsewhere/config\.json is not valid JSON"):
        find(weights, "--hf-config-path", elsewhere)


def test_a_name_of_one_word_may_be_on_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, *a, **k: asked.append(name))
    assert find("gpt2") == "gpt2"
    assert find("org/m:Q4_K_M") == "org/m:Q4_K_M"
    assert asked == ["gpt2", "org/m"]

    def absent(*args, **settings):
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(ParetoError, match=r"no such \(public\) model; the embedded models are ref-"):
        find("ref-8m")


def test_weights_of_a_falcon_are_not_called_missing(tmp_path):
    falcon = config(tmp_path / "falcon")
    save_file({"transformer.h.0.x": torch.zeros(2)}, falcon / "model.safetensors")
    with pytest.raises(ParetoError, match=r"FalconForCausalLM is not a supported decoder .* transformer\.h\.0\.x"):
        validate_checkpoint(falcon)


def test_a_cpu_server_takes_of_what_is_free(monkeypatch):
    utils = pytest.importorskip("vllm.utils.cpu_resource_utils")
    memory = SimpleNamespace(total_memory=100, available_memory=50)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(launch, "_vllm_build", lambda: "0.32.0+cpu")
    monkeypatch.setattr(utils, "get_memory_node_info", lambda node: memory)
    assert launch.memory_words(["serve", "m", "--port", "1"]) == ["--gpu-memory-utilization=0.400"]
    for said in ("--gpu-memory-utilization=0.5", "--gpu_memory_utilization", "--kv-cache-memory-bytes", "--config"):
        assert launch.memory_words(["serve", "m", said, "1"]) == []
    monkeypatch.setattr(launch, "_vllm_build", lambda: "0.32.0")
    assert launch.memory_words(["serve", "m"]) == []
    monkeypatch.setattr(launch, "_vllm_build", lambda: "0.32.0+cpu")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert launch.memory_words(["serve", "m"]) == []
