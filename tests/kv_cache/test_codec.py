"""The bit layout and the quantizers, on fresh random numbers each run (the seed is printed by pytest on failure)."""

from __future__ import annotations

import random

import pytest
import torch

from kv_cache import codec
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, HEAD_SIZES, get_format
from kv_cache.layout import PageLayout
from tests.kv_cache.random_scales import random_scales


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    torch.manual_seed(value)
    print(f"seed {value}")
    return value


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_nibbles_round_trip(seed, dim):
    codes = torch.randint(0, 16, (7, dim), dtype=torch.uint8)
    packed = codec.pack_nibbles(codes)
    assert packed.shape == (7, dim // 2)
    assert torch.equal(codec.unpack_nibbles(packed), codes)
    assert packed[3, 1] == codes[3, 1] + 16 * codes[3, 1 + dim // 2]


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_pairs_round_trip(seed, dim):
    codes = torch.randint(0, 4, (5, dim), dtype=torch.uint8)
    packed = codec.pack_pairs(codes)
    assert packed.shape == (5, dim // 4)
    assert torch.equal(codec.unpack_pairs(packed), codes)
    q = dim // 4
    assert packed[2, 1] == sum(int(codes[2, 1 + k * q]) << (2 * k) for k in range(4))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantize_is_within_half_a_step(seed, bits):
    top = 2**bits - 1
    scale, zero = torch.rand(3, 64) + 0.1, torch.rand(3, 64) * top
    codes = torch.randint(0, top + 1, (50, 3, 64))
    exact = (codes - zero) * scale
    assert torch.equal(codec.quantize(exact, scale, zero, bits).long(), codes)
    x = exact + (torch.rand(50, 3, 64) - 0.5) * scale * 0.98
    restored = codec.dequantize(codec.quantize(x, scale, zero, bits), scale, zero)
    inside = (codes > 0) & (codes < top)
    assert ((restored - x).abs() <= 0.5 * scale)[inside].all()


def test_quantize_saturates_and_maps_nan_to_zero():
    scale, zero = torch.ones(1, 4), torch.full((1, 4), 3.0)
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 2.5]])
    assert codec.quantize(x, scale, zero, 4).tolist() == [[0, 15, 0, 6]]  # 5.5 rounds to even


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_groups_are_within_half_a_step(seed, bits, dim):
    x = torch.randn(20, dim) * 3
    codes, scales, minima = codec.quantize_groups(x, bits, 32)
    assert scales.shape == (20, -(-dim // 32))
    restored = codec.dequantize_groups(codes, scales, minima, 32)
    for group, scale in zip((restored - x).split(32, -1), scales.split(1, -1), strict=True):
        # float16 rounds the minimum and the step, so the top code may miss by a little more than half a step.
        assert (group.abs() <= scale.float() * 0.62 + 0.004).all()


def test_group_of_equal_values_has_codes_zero():
    codes, scales, minima = codec.quantize_groups(torch.full((1, 32), 1.5), 4, 32)
    assert not codes.any()
    assert not scales.any()
    assert minima.item() == 1.5


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_pages_read_back_what_was_written(seed, name, dim):
    fmt = FORMATS[name]
    layout = PageLayout(fmt, dim, 16)
    scales = random_scales(name, 2, dim)
    cache = torch.randint(0, 256, (3, 2, 16, layout.bytes_per_token), dtype=torch.uint8)
    before = cache.clone()
    key, value = torch.randn(16, 2, dim), torch.randn(16, 2, dim)
    slots = torch.arange(16) + 16
    slots[5] = -1
    codec.write_pages(cache, key, value, slots, layout, scales)
    assert torch.equal(cache[[0, 2]], before[[0, 2]])
    for head in range(2):
        read = codec.read_page(cache[1, head].view(-1), layout, scales, head)
        for kind, x, got, bits in zip(
            ("key", "value"), (key, value), read, (fmt.key_bits, fmt.value_bits), strict=True
        ):
            if scales is None:
                want = codec.dequantize_groups(*codec.quantize_groups(x[:, head], bits, fmt.group_size), fmt.group_size)
            else:
                scale, zero = getattr(scales, f"{kind}_scale")[head], getattr(scales, f"{kind}_zero")[head]
                want = codec.dequantize(codec.quantize(x[:, head], scale, zero, bits), scale, zero)
            written = torch.arange(16) != 5
            assert torch.equal(got[written], want[written])


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_planes_fill_the_page(name, dim):
    layout = PageLayout(FORMATS[name], dim, 32)
    rows, offsets = layout.row_bytes(), layout.offsets()
    at = 0
    for plane, row in rows.items():
        assert offsets[plane] == at
        assert at % 16 == 0
        at += row * 32
    assert at == layout.page_bytes == 32 * FORMATS[name].bytes_per_token(dim)


def test_names_bits_and_ratios():
    assert get_format("int4_per_head").compression_ratio(64) == 4.0
    assert get_format("k8v4_per_head").bits_per_element(128) == 6.0
    assert get_format("int4_per_group").bits_per_element(128) == 5.0
    with pytest.raises(ParetoError, match="int4_per_head"):
        get_format("int5_per_head")


@pytest.mark.parametrize(("dim", "block"), [(48, 16), (64, 24), (64, 8)])
def test_layout_refuses_what_it_does_not_serve(dim, block):
    with pytest.raises(ParetoError):
        PageLayout(FORMATS["int4_per_head"], dim, block)
