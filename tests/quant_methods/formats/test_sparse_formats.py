"""Sparse layouts of compressed-tensors 0.11.0, which wrote the bytes whose digests stand here."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.form import Form
from quant_methods.formats.native_format import unpack
from quant_methods.formats.parts.grid_codes import GridCodes, GridForm
from quant_methods.formats.sparse_formats import expanded, is_sparse, unpack_bitmask, unpack_marlin_24
from tests.quant_methods.sparse_writer import bitmask, bitmask_24, kept, marlin_24

# SHA-256, shortened, of what the compressors of 0.11.0 wrote for `codes` and `scales` below.
META = {128: "583acf0785559058", 256: "2058a4f6f5a6c1de", 512: "257d5c88d3a1937e"}
SCALES = {1: "fd35bd14ba4481c7", 2: "a5a9ca344fcdc57e", 4: "a2c811098918224c"}
PACKED = {
    (4, 128): "9a5394c8177b1dab", (4, 256): "eb9d6279ea57369e", (4, 512): "d4154182fbc7aa65",
    (8, 128): "b5fb569482f054b2", (8, 256): "d2c8cbd6563269e7", (8, 512): "162c8c4f7f7a2d0e",
}  # fmt: skip
BITMASK = {
    "shape": "445c4f6e595187a5", "compressed": "ee53dbfbcd7018d4", "bitmask": "d2c7810786cd434a",
    "row_offsets": "bab260c8517741a6",
}  # fmt: skip
BITMASK_24 = {"shape": "445c4f6e595187a5", "compressed": "90be8cdc6062b816", "bitmask": "09ce9c4ed9b01690"}
MARLIN = [(bits, inputs, groups) for bits in (4, 8) for inputs, groups in ((128, 1), (256, 2), (512, 4), (512, 1))]


def codes(inputs: int) -> Tensor:
    """2:4 codes [64, inputs] that need no generator of random numbers."""
    place = torch.arange(64 * inputs).view(64, inputs)
    four = place[:, ::4] // 4
    first = (four * 40503 >> 3) % 4
    second = (first + 1 + (four * 9176 >> 5) % 3) % 4
    mask = torch.zeros(64, inputs // 4, 4, dtype=torch.bool).scatter_(2, torch.stack([first, second], -1), True)
    return ((place * 2654435761 >> 7) % 15 - 7) * mask.view(64, inputs)


def scales(groups: int) -> Tensor:
    return 2.0 ** -(torch.arange(64)[:, None] % 5 + torch.arange(groups)[None] % 3)


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    raw = {name: tensor.contiguous().view(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return {name: hashlib.sha256(data.tobytes()).hexdigest()[:16] for name, data in raw.items()}


@pytest.mark.parametrize(("bits", "inputs", "groups"), MARLIN)
def test_marlin_24_of_the_real_writer_reads_as_it_was(bits: int, inputs: int, groups: int) -> None:
    stored = marlin_24(codes(inputs), scales(groups), bits)
    wanted = {"weight_packed": PACKED[bits, inputs], "scale_packed": SCALES[groups], "meta": META[inputs]}
    assert digests(stored) == wanted
    found = unpack_marlin_24("a", stored)
    assert torch.equal(found.codes.long(), codes(inputs))
    assert torch.equal(found.scale.float(), scales(groups))
    assert (found.bits, found.symmetric) == (bits, True)


@pytest.mark.parametrize(("write", "wanted"), [(bitmask, BITMASK), (bitmask_24, BITMASK_24)])
def test_bitmasks_of_the_real_writer_read_as_they_were(write: Any, wanted: dict[str, str]) -> None:
    weight = codes(72).half()
    stored = write(weight)
    assert digests(stored) == wanted
    assert torch.equal(unpack_bitmask("a", stored), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_bitmasks_of_every_dtype_and_of_ragged_widths(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for width in (1, 12, 13, 64):
        mask = torch.rand(7, width, generator=generator) < 0.5
        values = torch.randint(1, 100, (7, width), generator=generator).float().to(dtype).view(7, width)
        dense = (values.float() * mask).to(dtype)
        stored = bitmask(dense.float()) | {"compressed": dense.float()[mask].to(dtype)}
        assert torch.equal(unpack_bitmask("a", stored).float(), dense.float())
    assert unpack_bitmask("a", stored).dtype == dtype


def test_tensors_come_in_any_order_and_through_other_shards() -> None:
    weight, grid = codes(128).half(), marlin_24(codes(128), scales(1), 4)
    stream = [(f"m.{name}", tensor) for name, tensor in grid.items()]
    stream += [(f"b.{name}", tensor) for name, tensor in bitmask(weight).items()] + [("norm.weight", weight[0])]
    for order in (stream, stream[::-1], stream[1::2] + stream[::2]):
        found = dict(expanded(iter(order), marlin=True))
        assert set(found) == {"norm.weight", "b.weight", "m.weight_plane4", "m.weight_scale"}
        assert torch.equal(found["b.weight"], weight)
        own = {name[2:]: tensor for name, tensor in found.items() if name.startswith("m.")}
        assert torch.equal(unpack("m", own, Form((GridForm(4),))).part(GridCodes).codes.long(), codes(128))


def test_packed_weights_of_other_layouts_pass() -> None:
    packed = [("a.weight_packed", torch.ones(2, 2)), ("a.weight_scale", torch.ones(2, 1))]
    for marlin in (False, True):
        assert dict(expanded(packed, marlin=marlin)) == dict(packed)


def test_damage_is_said_in_a_line() -> None:
    weight, grid = codes(128).half(), marlin_24(codes(128), scales(1), 4)
    for change, message in (
        ({"compressed": weight.flatten()[:5]}, r"a\.compressed has 5 elements and a\.bitmask 3832 bits"),
        ({"bitmask": bitmask(weight)["bitmask"][:3]}, r"a\.bitmask is torch.uint8 \[3, 16\]"),
        ({"shape": torch.tensor([64])}, r"expected torch.uint8 with a bit for each"),
        ({"row_offsets": torch.zeros(64, dtype=torch.int64)}, r"a\.row_offsets does not say"),
    ):
        with pytest.raises(ParetoError, match=message):
            unpack_bitmask("a", bitmask(weight) | change)
    for change, message in (
        ({"meta": grid["meta"][:2]}, r"a: meta \[2, 128\], scale_packed .* no 2:4 weight of 4 or 8 bits"),
        ({"scale_packed": torch.ones(64)}, "are no 2:4 weight"),
        ({"meta": grid["meta"].int()}, r"meta torch.int32 .* expected torch.int32, torch.int16"),
    ):
        with pytest.raises(ParetoError, match=message):
            unpack_marlin_24("a", grid | change)
    with pytest.raises(ParetoError, match=r"the checkpoint lacks a\.bitmask, without which"):
        list(expanded([("a.compressed", weight), ("a.shape", torch.tensor([64, 128]))], marlin=False))


def test_what_a_configuration_says() -> None:
    tensors = {"quant_method": "compressed-tensors"}
    for settings, sparse in (
        (None, False),
        ({"quant_method": "gptq", "sparsity_config": {"format": "dense"}}, False),
        (tensors | {"sparsity_config": {}}, False),
        (tensors | {"sparsity_config": {"format": "dense"}}, True),
        (tensors | {"sparsity_config": {"format": "sparse-bitmask"}}, True),
        (tensors | {"format": "marlin-24", "config_groups": {"g": {}}}, True),
        (tensors | {"format": "mixed-precision", "config_groups": {"g": {"format": "marlin-24"}}}, True),
        (tensors | {"format": "pack-quantized", "config_groups": {"g": {}}}, False),
    ):
        assert is_sparse(settings) is sparse, settings
    with pytest.raises(ParetoError, match="format 'sparse-48'; expected dense, sparse-24-bitmask, sparse-bitmask"):
        is_sparse(tensors | {"sparsity_config": {"format": "sparse-48"}})
    assert int(kept(codes(72).half()).sum()) == 64 * 36
