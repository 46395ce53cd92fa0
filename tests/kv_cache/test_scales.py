"""The file of calibrated scales: what it keeps, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, MIXED, layer_format
from kv_cache.scales import MATRIX_DTYPE, SCALES_FILE, TENSORS, KVScales
from tests.kv_cache.random_scales import MAX_POSITION, random_rotary, random_scales

LAYERS, HEADS, DIM = 3, 4, 64
BITS = [(4, 3), (2, 2), (8, 3)]


def some_scales(dim: int = DIM, bits: list[tuple[int, int]] | None = None) -> KVScales:
    rotary = random_rotary(dim)
    layers = [replace(random_scales(HEADS, dim), rotary=rotary) for _ in range(LAYERS)]
    return KVScales(layers, bits, metadata={"seed": 3, "source": "text"})


def rewrite(folder, change) -> None:
    """Change the tensors and the header of a saved file."""
    path = folder / SCALES_FILE
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kv_scales"])
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata={"kv_scales": json.dumps(header)})


@pytest.mark.parametrize("bits", [None, BITS])
@pytest.mark.parametrize("dim", [64, 80, 96])
def test_a_saved_file_reads_back_the_same(tmp_path, dim, bits):
    scales = some_scales(dim, bits)
    path = scales.save(tmp_path)
    assert path == tmp_path / "kv_scales" / "scales.safetensors"
    assert [entry.name for entry in path.parent.iterdir()] == ["scales.safetensors"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # readable by whom the user's umask says
    loaded = KVScales.load(tmp_path)
    assert [loaded.shape(index) for index in range(loaded.num_layers)] == [(HEADS, dim)] * LAYERS
    assert loaded.metadata == {"seed": 3, "source": "text"}
    assert loaded.bits == bits
    assert torch.equal(loaded.layer(0).rotary.inv_freq, scales.layer(0).rotary.inv_freq)
    for name in ("max_position", "rotated", "interleaved"):
        assert getattr(loaded.layer(0).rotary, name) == getattr(scales.layer(0).rotary, name)
    for index in range(LAYERS):
        before, after = scales.layer(index), loaded.layer(index)
        for tensor in TENSORS:
            assert torch.equal(getattr(before, tensor), getattr(after, tensor)), tensor
            assert getattr(after, tensor).dtype == torch.float32
        assert after.rotary is loaded.layer(0).rotary


def test_scales_are_read_into_memory_whatever_the_default_device(tmp_path):
    """A worker of tensor parallelism reads them while vLLM builds the model on its GPU."""
    made = some_scales()
    made.save(tmp_path)
    with torch.device("meta"):
        loaded = KVScales.load(tmp_path)
    assert torch.equal(loaded.layer(0).key_mean, made.layer(0).key_mean)


def test_the_transform_takes_two_bytes_an_entry(tmp_path):
    path = some_scales().save(tmp_path)
    with safe_open(path, framework="pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in TENSORS}
    assert dtypes == {name: MATRIX_DTYPE if name == "key_transform" else torch.float32 for name in TENSORS}


def test_saving_again_replaces_the_file(tmp_path):
    scales = some_scales()
    scales.save(tmp_path)
    scales.metadata["seed"] = 4
    scales.save(tmp_path)
    assert KVScales.load(tmp_path).metadata["seed"] == 4


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch):
    scales = some_scales()
    path = scales.save(tmp_path)
    before = path.read_bytes()
    scales.metadata["seed"] = 4

    def refuse(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        scales.save(tmp_path)
    assert path.read_bytes() == before


def test_a_rank_gets_its_own_heads():
    layer = some_scales().layer(1)
    part = layer.heads(2, 4)
    for tensor in TENSORS:
        assert torch.equal(getattr(part, tensor), getattr(layer, tensor)[2:4])
        assert getattr(part, tensor).is_contiguous()
    assert part.rotary is layer.rotary
    assert torch.equal(part.value_encode, layer.value_encode[2:4])


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_values_are_mixed_to_their_size(dim):
    layer = random_scales(2, dim)
    run = {64: 64, 80: 16, 96: 32, 128: 128, 256: 256}[dim]
    size = layer.value_size.double()
    assert torch.equal(layer.value_encode, (1 / (math.sqrt(run) * size)).float())
    assert torch.equal(layer.value_decode, (size / math.sqrt(run)).float())
    # Mixing twice multiplies by the run, which both factors together take off again.
    assert torch.allclose(layer.value_encode * layer.value_decode * run, torch.ones(2))


def test_bits_of_layers_are_those_of_the_dtype_or_their_own():
    scales = some_scales(bits=BITS)
    for index, bits in enumerate(BITS):
        assert scales.format("int4_per_head", index) is FORMATS["int4_per_head"]
        assert scales.format(MIXED, index) == layer_format(*bits)
    assert scales.bits_per_element("int4_per_head") == 4.25
    assert scales.bits_per_element(MIXED) == pytest.approx((3.5 + 2 + 5.5) / 3 + 0.25)


def test_the_mixed_dtype_without_bits_says_how_to_choose_them():
    with pytest.raises(ParetoError, match=r"mixed_per_head needs bits.*--kv-budget"):
        some_scales().format(MIXED, 0)


def test_what_is_not_there_is_named():
    scales = some_scales(bits=BITS)
    with pytest.raises(ParetoError, match="for 3 layers, not for layer 3"):
        scales.layer(3)
    with pytest.raises(ParetoError, match="for 3 layers, not for layer -1"):
        scales.format(MIXED, -1)
    with pytest.raises(ParetoError, match="unknown KV-cache format 'int5'"):
        scales.format("int5", 0)


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
    header["schema"] = "vllm-pareto/kv-scales/2"


def _heads(tensors, header):
    header["num_kv_heads"] = HEADS + 1


def _nan(tensors, header):
    tensors["key_first"][1, 2, 3] = float("nan")


def _infinite(tensors, header):
    tensors["key_transform"][0, 0, 1, 2] = float("inf")


def _no_size(tensors, header):
    tensors["value_size"][2, 0] = 0.0


def _long_mirror(tensors, header):
    tensors["value_mirror"][1, 1] *= 1.01


def _missing(tensors, header):
    del tensors["key_first"]


def _no_rotary(tensors, header):
    del header["rotary"]


def _matrix_shape(tensors, header):
    tensors["key_inverse"] = tensors["key_inverse"][..., :-1].contiguous()


def _frequencies(tensors, header):
    tensors["rotary.inv_freq"] = tensors["rotary.inv_freq"][:-1].contiguous()


def _bits_of_too_few(tensors, header):
    header["bits"] = header["bits"][:-1]


def _bits_of_no_code(tensors, header):
    header["bits"][1] = [5, 4]


def _no_bits(tensors, header):
    del header["bits"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_schema, "another version"),
        (_heads, r"key_mean has the shape \(3, 4, 64\) instead of \(3, 5, 64\)"),
        (_nan, "key_first is not finite"),
        (_infinite, "key_transform is not finite"),
        (_no_size, "value_size is not positive"),
        (_long_mirror, "value_mirror is neither 0 nor"),
        (_missing, "truncated"),
        (_no_rotary, "truncated"),
        (_matrix_shape, "key_inverse has the shape"),
        (_frequencies, "31 rotary frequencies do not fit heads of 64 channels"),
        (_bits_of_too_few, "bits for 2 layers instead of 3"),
        (_bits_of_no_code, "codes of 5 bits are not served"),
        (_no_bits, "truncated"),
    ],
)
def test_damaged_scales_are_refused(tmp_path, change, message):
    some_scales(bits=BITS).save(tmp_path)
    rewrite(tmp_path, lambda tensors, header: None)
    assert KVScales.load(tmp_path).layer(0).rotary.max_position == MAX_POSITION  # rewriting alone does no damage
    rewrite(tmp_path, change)
    with pytest.raises(ParetoError, match=message):
        KVScales.load(tmp_path)
