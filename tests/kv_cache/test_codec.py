"""The bit layout and the quantizer, on fresh random numbers each run (the seed is printed by pytest on failure)."""

from __future__ import annotations

import random

import pytest
import torch

from kv_cache import codec
from kv_cache.formats import FORMATS, GAIN, HEAD_SIZES, PLANES, KVFormat, layer_format
from kv_cache.layout import META, PageLayout
from kv_cache.transforms import hadamard_sums
from tests.kv_cache.random_scales import MAX_POSITION, random_scales

FMTS = {fmt.name: fmt for fmt in FORMATS.values()} | {
    f"k{k}v{v}": layer_format(k, v) for k, v in ((2, 2), (8, 3), (2, 8))
}
"""Every dtype, and some layers that ``mixed_per_head`` may have."""
SHAPES = [
    (name, dim)
    for name, fmt in FMTS.items()
    for dim in HEAD_SIZES
    if dim % 32 == 0 or 3 not in (fmt.key_bits, fmt.value_bits)
]


pytestmark = pytest.mark.usefixtures("fresh_numbers")


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_plane_holds_channel_j_plus_k_times_its_bytes(width, dim):
    part = torch.randint(0, 2**width, (7, dim), dtype=torch.uint8)
    packed = codec.pack_plane(part, width)
    row = dim * width // 8
    assert packed.shape == (7, row)
    for j in random.sample(range(row), 5):
        assert packed[3, j] == sum(int(part[3, j + k * row]) << (k * width) for k in range(8 // width))
    assert torch.equal(codec.unpack_plane(packed, width), part)


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("bits", PLANES)
def test_planes_of_a_code_from_the_lowest_bits_to_the_highest(bits, dim):
    codes = torch.randint(0, 2**bits, (5, dim), dtype=torch.uint8)
    planes = codec.split_planes(codes, bits)
    assert [plane.shape[-1] for plane in planes] == [dim * width // 8 for width in PLANES[bits]]
    assert torch.equal(codec.join_planes(planes, bits), codes)
    low = PLANES[bits][0]
    assert torch.equal(codec.unpack_plane(planes[0], low), codes & (2**low - 1))


def test_a_scales_byte_is_the_nearest_there_is():
    every = codec.decode_scale(torch.arange(256, dtype=torch.uint8))
    assert every[160] == 1
    assert torch.equal(every.unique(), every)  # they ascend
    assert torch.equal(codec.encode_scale(every), torch.arange(256, dtype=torch.uint8))
    scale = every[0] * (every[-1] / every[0]) ** torch.rand(500)
    chosen = (codec.decode_scale(codec.encode_scale(scale)) - scale).abs()
    assert torch.equal(chosen, (every[None] - scale[:, None]).abs().amin(-1))
    assert codec.encode_scale(torch.tensor([0.0, 1e-30, 1e30, float("inf")])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("bits", PLANES)
def test_quantize_is_within_half_a_step(bits):
    y = torch.randn(50, 3, 64) * 2.0 ** torch.randint(-3, 4, (50, 3, 1)) + torch.randn(50, 3, 1)
    codes, scale, zero = codec.quantize(y, bits)
    assert int(codes.max()) < 2**bits
    step, shift = codec.decode_scale(scale) * 2.0 ** (2 - bits), zero.float() * 2.0 ** (bits - 8)
    error = (codec.dequantize(codes, scale, zero, bits, torch.float64) - GAIN[bits] * y).abs()
    # Between the ends of the codes' range a code is the nearest there is; beyond, it is the end.
    place = GAIN[bits] * y / step[..., None] + shift[..., None]
    inside = (place > 0) & (place < 2**bits - 1)
    assert inside.double().mean() > 0.5
    assert (error <= 0.5001 * step[..., None])[inside].all()
    assert (codes[place <= 0] == 0).all()
    assert (codes[place >= 2**bits - 1] == 2**bits - 1).all()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", PLANES)
def test_clipping_does_not_shorten_what_is_read(bits, dim):
    y = torch.randn(5000, dim) + 0.7 * torch.randn(5000, 1)
    read = codec.dequantize(*codec.quantize(y, bits), bits)
    length = (y * read).sum(-1) / y.square().sum(-1)
    # Without a gain 2 bits read 0.968, 3 bits 0.988 and 4 bits 0.997 of the length at head size 64.
    assert abs(length.mean() - 1) < {2: 0.012, 3: 0.004}.get(bits, 0.0015)


@pytest.mark.parametrize("bits", [6, 8])
def test_codes_cover_a_tokens_whole_range(bits):
    """Where the share of the range is 1, nothing is clipped by more than the bytes of scale and zero round off."""
    y = torch.randn(200, 64) * 3 + torch.randn(200, 1) * 5
    codes, scale, zero = codec.quantize(y, bits)
    span = y.amax(-1).clamp_min(0) - y.amin(-1).clamp_max(0)
    error = (codec.dequantize(codes, scale, zero, bits) - y).abs().amax(-1)
    assert (error <= span * (0.5 / (2**bits - 1) + 1 / 32 + 1 / 256)).all()


@pytest.mark.parametrize("bits", PLANES)
def test_zero_is_within_a_step_where_all_is_positive_or_negative(bits):
    for sign in (1, -1):
        y = sign * (torch.rand(20, 64) + 1)
        y[:, 5] = 0
        codes, scale, zero = codec.quantize(y, bits)
        restored = codec.dequantize(codes, scale, zero, bits)
        assert (restored[:, 5].abs() <= codec.decode_scale(scale) * 2.0 ** (2 - bits)).all()


@pytest.mark.parametrize("bits", PLANES)
def test_quantize_saturates_and_counts_nan_as_zero(bits):
    y = torch.randn(4, 64)
    y[0, 3], y[1, 4], y[2, 5], y[3] = float("nan"), float("inf"), float("-inf"), float("nan")
    y[1] = y[1].abs()
    codes, scale, zero = codec.quantize(y, bits)
    without = y[0].clone()
    without[3] = 0
    alone = codec.quantize(without, bits)
    assert all(torch.equal(a[0], b) for a, b in zip((codes, scale, zero), alone, strict=True))
    top = 2**bits - 1
    assert (scale[1], zero[1], codes[1, 4]) == (255, 0, top)
    assert (scale[2], zero[2], codes[2, 5]) == (255, 255, 0)
    assert codec.dequantize(codes, scale, zero, bits).isfinite().all()
    assert not codec.dequantize(codes, scale, zero, bits)[3].any()


@pytest.mark.parametrize(("name", "dim"), SHAPES)
def test_pages_read_back_what_was_written(name, dim):
    fmt: KVFormat = FMTS[name]
    layout, scales = PageLayout(fmt, dim, 16), random_scales(2, dim)
    cache = torch.randint(0, 256, (3, 2, 16, layout.bytes_per_token), dtype=torch.uint8)
    before = cache.clone()
    first = random.choice([0, random.randrange(MAX_POSITION - 16)])
    positions = torch.arange(first, first + 16)
    key, value = torch.randn(16, 2, dim) * 2, torch.randn(16, 2, dim)
    slots = torch.arange(16) + 16
    slots[5] = -1
    codec.write_pages(cache, key, value, slots, layout, scales, positions)
    assert torch.equal(cache[[0, 2]], before[[0, 2]])
    written = torch.arange(16) != 5
    changed = torch.zeros(layout.page_bytes, dtype=torch.bool)
    for plane, row in layout.row_bytes.items():
        at = layout.offsets[plane] + 5 * row
        changed[at : at + row] = True
    for head in range(2):  # the skipped token's bytes are as they were, in every plane
        assert torch.equal(cache[1, head].view(-1)[changed], before[1, head].view(-1)[changed])
    even = {"key": codec.even_keys(key, scales, positions), "value": codec.even_values(value, scales)}
    for head in range(2):
        page = cache[1, head].view(-1)
        read = codec.read_page(page, layout, scales, head, first, torch.float64)
        for kind, got in zip(("key", "value"), read, strict=True):
            bits = fmt.bits(kind)
            codes, scale, zero = codec.quantize(even[kind][:, head], bits)
            restored = codec.dequantize(codes, scale, zero, bits, torch.float64)
            mine = scales.heads(head, head + 1)
            want = (
                codec.uneven_keys(restored[:, None], mine, positions)
                if kind == "key"
                else codec.uneven_values(restored[:, None], mine)
            )[:, 0]
            assert torch.equal(got[written], want[written])


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_eight_bits_bring_keys_and_values_back(dim):
    layout, scales = PageLayout(FMTS["int8_per_head"], dim, 16), random_scales(2, dim)
    cache = torch.zeros(1, 2, 16, layout.bytes_per_token, dtype=torch.uint8)
    key, value = torch.randn(16, 2, dim), torch.randn(16, 2, dim)
    key[0] += scales.key_first
    codec.write_pages(cache, key, value, torch.arange(16), layout, scales, torch.arange(16))
    for head in range(2):
        read = codec.read_page(cache[0, head].view(-1), layout, scales, head, 0)
        for x, got in zip((key, value), read, strict=True):
            error = (got - x[:, head]).norm(dim=-1) / x[:, head].norm(dim=-1)
            assert error.max() < 0.1


def test_the_first_position_has_a_centre_of_its_own():
    scales = random_scales(2, 64)
    centre = codec.centres(scales, torch.tensor([0, 1, 0, 300]))
    assert torch.equal(centre[0], scales.key_first)
    assert torch.equal(centre[2], scales.key_first)
    table = scales.rotary.table(301)
    assert torch.equal(centre[[1, 3]], table.centre(scales.key_mean, torch.tensor([1, 300])))
    turned = scales.rotary.turn(scales.key_mean[None].expand(2, -1, -1), torch.tensor([1, 300]))
    assert ((centre[[1, 3]] - turned).norm() / turned.norm()) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_centres_are_the_same_on_a_gpu():
    scales, positions = random_scales(2, 64), torch.tensor([0, 1, 255, 256, 4000])
    found = codec.centres(scales.to(torch.device("cuda")), positions)
    assert found.device.type == "cuda"
    assert torch.equal(found.cpu(), codec.centres(scales, positions))


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_hadamard_sums_twice_multiply_by_their_length(dim):
    x = torch.randn(3, dim, dtype=torch.float64)
    assert torch.allclose(hadamard_sums(hadamard_sums(x)), x * (dim & -dim))
    one = hadamard_sums(torch.eye(dim, dtype=torch.float64))
    assert torch.equal(one.abs().sum(-1), torch.full((dim,), float(dim & -dim), dtype=torch.float64))


def test_meta_of_a_token_is_four_bytes_in_order():
    layout, scales = PageLayout(FMTS["k4v3_per_head"], 64, 16), random_scales(1, 64)
    key, value, positions = torch.randn(1, 1, 64), torch.randn(1, 1, 64), torch.tensor([9])
    cache = torch.zeros(1, 1, 16, layout.bytes_per_token, dtype=torch.uint8)
    codec.write_pages(cache, key, value, torch.tensor([2]), layout, scales, positions)
    _, key_scale, key_zero = codec.quantize(codec.even_keys(key, scales, positions), 4)
    _, value_scale, value_zero = codec.quantize(codec.even_values(value, scales), 3)
    at = layout.offsets[META] + 4 * 2
    want = [int(x) for x in (key_scale, key_zero, value_scale, value_zero)]
    assert cache.view(-1)[at : at + 4].tolist() == want
