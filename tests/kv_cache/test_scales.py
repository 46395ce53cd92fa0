"""The file of calibrated scales: what it keeps, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, get_format
from kv_cache.scales import MATRIX_DTYPE, PARTS, ROUNDED, SCALES_FILE, TENSORS, KVScales
from tests.kv_cache.random_scales import random_scales

LAYERS, HEADS, DIM = 3, 4, 64


def some_scales() -> KVScales:
    torch.manual_seed(0)
    layers, rotary = {}, None
    for coding in ("int4_per_head+centred", "k8v4_per_head+feedback", "int6_per_head"):
        made = [random_scales(coding, HEADS, DIM) for _ in range(LAYERS)]
        rotary = rotary or made[0].rotary
        layers[coding.partition("+")[0]] = [
            replace(layer, rotary=layer.rotary and rotary, **{part: rounded(getattr(layer, part)) for part in ROUNDED})
            for layer in made
        ]
    return KVScales(LAYERS, HEADS, DIM, layers=layers, metadata={"seed": 3, "source": "text"}, rotary=rotary)


def rounded(part: torch.Tensor | None) -> torch.Tensor | None:
    """What the file keeps of a matrix."""
    return None if part is None else part.to(MATRIX_DTYPE).float()


def rewrite(folder, change) -> None:
    """Change the tensors and the header of a saved file."""
    path = folder / SCALES_FILE
    header = {"schema": "vllm-pareto/kv-scales/2", "num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM}
    header["rotary"] = {"max_position": 5000, "interleaved": False}
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata={"kv_scales": json.dumps(header)})


def test_a_saved_file_reads_back_the_same(tmp_path):
    scales = some_scales()
    path = scales.save(tmp_path)
    assert path == tmp_path / "kv_scales" / "scales.safetensors"
    assert [entry.name for entry in path.parent.iterdir()] == ["scales.safetensors"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # readable by whom the user's umask says
    loaded = KVScales.load(tmp_path)
    assert (loaded.num_layers, loaded.num_kv_heads, loaded.head_dim) == (LAYERS, HEADS, DIM)
    assert loaded.metadata == {"seed": 3, "source": "text"}
    assert set(loaded.layers) == {"int4_per_head", "k8v4_per_head", "int6_per_head"}
    assert torch.equal(loaded.rotary.inv_freq, scales.rotary.inv_freq)
    assert (loaded.rotary.max_position, loaded.rotary.interleaved) == (5000, False)
    for name in loaded.layers:
        for index in range(LAYERS):
            before, after = scales.layer(get_format(name), index), loaded.layer(get_format(name), index)
            for tensor in TENSORS:
                assert torch.equal(getattr(before, tensor), getattr(after, tensor))
            for part in PARTS:
                assert (getattr(before, part) is None) == (getattr(after, part) is None)
                assert getattr(before, part) is None or torch.equal(getattr(before, part), getattr(after, part))
            assert (after.rotary is loaded.rotary) == (name == "int4_per_head")


def test_saving_again_replaces_the_file(tmp_path):
    scales = some_scales()
    scales.save(tmp_path)
    scales.metadata["seed"] = 4
    scales.save(tmp_path)
    assert KVScales.load(tmp_path).metadata["seed"] == 4


def test_a_rank_gets_its_own_heads():
    layer = some_scales().layer(FORMATS["int4_per_head"], 1)
    part = layer.heads(2, 4)
    for tensor in (*TENSORS, *PARTS):
        assert torch.equal(getattr(part, tensor), getattr(layer, tensor)[2:4])
        assert getattr(part, tensor).is_contiguous()
    assert torch.equal(part.key_decode, layer.key_decode[2:4])


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


def _no_feedback(tensors, header):
    del tensors["int4_per_head.key_feedback"]


def _no_rotary(tensors, header):
    del header["rotary"]


def _matrix_shape(tensors, header):
    tensors["k8v4_per_head.value_feedback"] = tensors["k8v4_per_head.value_feedback"][..., :-1].contiguous()


def _no_inverse(tensors, header):
    del tensors["int4_per_head.key_inverse"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_schema, "another version"),
        (_shape, "int4_per_head have a wrong shape"),
        (_nan, "int4_per_head are not finite"),
        (_zero_scale, "k8v4_per_head are not positive"),
        (_missing, "truncated"),
        (_no_feedback, "the keys' feedback"),
        (_no_rotary, "centred keys need a transform and the model's rotary embedding"),
        (_matrix_shape, "value_feedback of k8v4_per_head has a wrong shape"),
        (_no_inverse, "needs its inverse"),
    ],
)
def test_damaged_scales_are_refused(tmp_path, change, message):
    some_scales().save(tmp_path)
    rewrite(tmp_path, lambda tensors, header: None)
    KVScales.load(tmp_path)  # rewriting alone does no damage
    rewrite(tmp_path, change)
    with pytest.raises(ParetoError, match=message):
        KVScales.load(tmp_path)
