"""Packed weights of embedded models: unpacked once, whole, and from then on what the models are read from."""

import lzma
import os

import pytest

from kv_cache.errors import ParetoError
from quant_methods import embedded, model_source


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text("{}")
    (tmp_path / "tiny/model.safetensors.xz").write_bytes(lzma.compress(b"weights"))
    monkeypatch.setattr(model_source, "MODELS", tmp_path)
    return tmp_path


def test_weights_are_unpacked_once_and_again_when_they_are_newer(models):
    embedded.unpack(models)
    target = models / "tiny/model.safetensors"
    assert target.read_bytes() == b"weights"
    target.write_bytes(b"changed")
    embedded.unpack(models)
    assert target.read_bytes() == b"changed"
    packed = models / "tiny/model.safetensors.xz"
    packed.write_bytes(lzma.compress(b"others"))
    os.utime(packed, (target.stat().st_mtime + 5,) * 2)
    embedded.unpack(models)
    assert target.read_bytes() == b"others"


def test_a_broken_archive_leaves_nothing_behind(models):
    packed = models / "tiny/model.safetensors.xz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises((EOFError, lzma.LZMAError)):
        embedded.unpack(models)
    assert sorted(path.name for path in (models / "tiny").iterdir()) == ["config.json", "model.safetensors.xz"]


def test_where_nothing_can_be_written_one_line_says_so(models, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_source, "unpack", full)
    with pytest.raises(ParetoError, match=r"cannot be unpacked to .*tiny: No space left on device; install"):
        model_source.embedded_model("tiny")
    (models / "tiny/model.safetensors").write_bytes(b"weights")
    assert model_source.embedded_model("tiny") == models / "tiny"
