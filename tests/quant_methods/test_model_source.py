"""resolve_model: finds what is there, and says in one line what is wrong with what is not a model."""

import json
import shutil
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from kv_cache.errors import ParetoError
from quant_methods.embedded import MODELS
from quant_methods.model_source import fingerprint, name_of, resolve_model, sampled_fingerprint


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_finds_the_embedded_model_and_directories(tiny_model: Path) -> None:
    assert resolve_model("ref-7m") == MODELS / "ref-7m"
    assert resolve_model(tiny_model) == tiny_model
    assert (MODELS / "ref-7m" / "README.md").is_file()


def test_a_directory_wins_over_the_embedded_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy.rename(copy.parent / "ref-7m")
    monkeypatch.chdir(copy.parent)
    assert resolve_model("ref-7m").resolve() == copy.parent / "ref-7m"


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(path: Path | str, message: str) -> None:
    with pytest.raises(ParetoError, match=message) as error:
        resolve_model(path)
    assert "\n" not in str(error.value)


def test_missing_pieces(copy: Path) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    refused(copy, r"model\.safetensors is truncated: [\d,]+ bytes on disk, [\d,]+ expected")
    weights.write_bytes(data[:50])
    refused(copy, "is truncated: 50 bytes")
    weights.write_bytes(b"PK\x03\x04 this is a zip archive of something else")
    refused(copy, "is not a safetensors file")
    weights.unlink()
    refused(copy, "no model.safetensors and no model.safetensors.index.json")
    (copy / "pytorch_model.bin").write_bytes(b"x")
    refused(copy, r"found pytorch_model\.bin: convert it to safetensors")
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refused(copy, "names 1 missing file")
    (copy / "config.json").unlink()
    refused(copy, r"no config\.json")


def test_foreign_checkpoints(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "gptq"})
    refused(copy, r"already quantized \(gptq\)")
    assert resolve_model(copy, quantized=True) == copy
    edit_config(copy, quantization_config=None, architectures=["BertForMaskedLM"])
    refused(copy, "BertForMaskedLM is not a supported decoder")
    edit_config(copy, architectures=["LlamaForCausalLM"], num_hidden_layers=5)
    refused(copy, "config.json says 5 decoder layers and the weights of layer 3 are missing")
    (copy / "config.json").write_text("{")
    refused(copy, "is not valid JSON")


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("ref-8m", r"model 'ref-8m' not found: .* embedded models \(ref-7m\)")
    refused(tmp_path / "nothing" / "here", "not found")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file; a model is a directory")

    def offline(*args: object, **kwargs: object) -> None:
        raise LocalEntryNotFoundError("cannot find the files in the cache and outgoing traffic is disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("someone/some-model", "the hub cannot be reached .* local directory or the embedded model ref-7m")


def test_the_fingerprint_follows_the_weights(copy: Path, tiny_model: Path) -> None:
    assert fingerprint(copy) == fingerprint(tiny_model)
    save_file({"model.layers.0.x": torch.zeros(1)}, copy / "model.safetensors")
    assert fingerprint(copy) != fingerprint(tiny_model)


def test_the_sampled_fingerprint_follows_every_tensor_and_the_tokenizer(copy: Path, tiny_model: Path) -> None:
    known = sampled_fingerprint(tiny_model)
    assert sampled_fingerprint(copy) == known
    tensors = load_file(tiny_model / "model.safetensors")
    for name in tensors:
        save_file(tensors | {name: tensors[name] * 1.5}, copy / "model.safetensors", {"format": "pt"})
        assert sampled_fingerprint(copy) != known, name
    shutil.copyfile(tiny_model / "model.safetensors", copy / "model.safetensors")
    assert sampled_fingerprint(copy) == known
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        text = (copy / name).read_bytes()
        (copy / name).write_bytes(text + b"\n")
        assert sampled_fingerprint(copy) != known, name
        (copy / name).write_bytes(text)


def test_hub_models_come_in_the_revision_asked_for(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / "abc123"
    asked: list[dict[str, object]] = []

    def download(name: str, **settings: object) -> str:
        asked.append({"name": name, **settings})
        if settings["revision"] == "absent":
            raise RevisionNotFoundError(
                "404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub"))
            )
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        return str(snapshot if snapshot.is_dir() else copy.rename(snapshot))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_model("someone/some-model", revision="v2", download_dir="/models")
    assert found == snapshot
    assert {key: asked[0][key] for key in ("name", "revision", "cache_dir")} == {
        "name": "someone/some-model", "revision": "v2", "cache_dir": "/models",
    }  # fmt: skip
    with pytest.raises(ParetoError, match="the hub has it, and no revision 'absent' of it"):
        resolve_model("someone/some-model", revision="absent")
    assert name_of("someone/some-model") == "someone/some-model"
    assert name_of(found) == "someone/some-model@abc123"
    assert name_of(MODELS / "ref-7m") == "ref-7m"
