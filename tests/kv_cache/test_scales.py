"""The file of calibrated scales: what it keeps, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, get_format
from kv_cache.scales import SCALES_FILE, TENSORS, KVScales, LayerScales

LAYERS, HEADS, DIM = 3, 4, 64


def some_scales() -> KVScales:
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: [
            LayerScales(*(torch.rand(HEADS, DIM, generator=generator) + 0.1 for _ in TENSORS)) for _ in range(LAYERS)
        ]
        for name in ("int4_per_head", "k8v4_per_head")
    }
    return KVScales(LAYERS, HEADS, DIM, layers=layers, metadata={"seed": 3, "source": "text"})


def rewrite(folder, change) -> None:
    """Change the tensors and the header of a saved file."""
    path = folder / SCALES_FILE
    header = {"schema": "vllm-pareto/kv-scales/2", "num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM}
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata={"kv_scales": json.dumps(header)})


def test_a_saved_file_reads_back_the_same(tmp_path):
    scales = some_scales()
    path = scales.save(tmp_path)
    assert path == tmp_path / "kv_scales" / "scales.safetensors"
    assert [entry.name for entry in path.parent.iterdir()] == ["scales.safetensors"]
    loaded = KVScales.load(tmp_path)
    assert (loaded.num_layers, loaded.num_kv_heads, loaded.head_dim) == (LAYERS, HEADS, DIM)
    assert loaded.metadata == {"seed": 3, "source": "text"}
    assert set(loaded.layers) == {"int4_per_head", "k8v4_per_head"}
    for name in loaded.layers:
        for index in range(LAYERS):
            before, after = scales.layer(get_format(name), index), loaded.layer(get_format(name), index)
            for tensor in TENSORS:
                assert torch.equal(getattr(before, tensor), getattr(after, tensor))


def test_saving_again_replaces_the_file(tmp_path):
    scales = some_scales()
    scales.save(tmp_path)
    scales.metadata["seed"] = 4
    scales.save(tmp_path)
    assert KVScales.load(tmp_path).metadata["seed"] == 4


def test_a_rank_gets_its_own_heads():
    layer = some_scales().layer(FORMATS["int4_per_head"], 1)
    part = layer.heads(2, 4)
    for tensor in TENSORS:
        assert torch.equal(getattr(part, tensor), getattr(layer, tensor)[2:4])
        assert getattr(part, tensor).is_contiguous()


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [("int8_per_head", 0, "no KV scales for int8_per_head"), ("int4_per_head", 3, "for 3 layers, not for layer 3")],
)
def test_what_is_not_there_is_named(name, index, message):
    with pytest.raises(ParetoError, match=message):
        some_scales().layer(get_format(name), index)


def test_a_checkpoint_without_scales_says_how_to_make_them(tmp_path):
    with pytest.raises(ParetoError, match="pareto compress --recipe kv-scales"):
        KVScales.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -8])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = some_scales().save(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ParetoError, match="truncated"):
        KVScales.load(tmp_path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    path = some_scales().save(tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ParetoError, match="no KV-scales file"):
        KVScales.load(tmp_path)


def _schema(tensors, header):
    header["schema"] = "vllm-pareto/kv-scales/0"


def _shape(tensors, header):
    header["num_kv_heads"] = HEADS + 1


def _nan(tensors, header):
    tensors["int4_per_head.value_zero"][1, 2, 3] = float("nan")


def _zero_scale(tensors, header):
    tensors["k8v4_per_head.key_scale"][2, 0, 0] = 0.0


def _missing(tensors, header):
    del tensors["int4_per_head.key_zero"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_schema, "another version"),
        (_shape, "int4_per_head have a wrong shape"),
        (_nan, "int4_per_head are not finite"),
        (_zero_scale, "k8v4_per_head are not positive"),
        (_missing, "truncated"),
    ],
)
def test_damaged_scales_are_refused(tmp_path, change, message):
    some_scales().save(tmp_path)
    rewrite(tmp_path, lambda tensors, header: None)
    KVScales.load(tmp_path)  # rewriting alone does no damage
    rewrite(tmp_path, change)
    with pytest.raises(ParetoError, match=message):
        KVScales.load(tmp_path)
