"""The CUDA kernels that write and read pages against the specification.

Values are coded bit for bit. A key's bytes may differ where a number lies next to a tie, as products are rounded in
another way: each byte is checked to be the nearest, in float64, given those that it depends on.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kv_cache import codec
from kv_cache.cuda.constants import LayerConstants
from kv_cache.cuda.read import gather, plan
from kv_cache.cuda.store import store
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, HEAD_SIZES, KVFormat, layer_format
from kv_cache.layout import META, PageLayout
from kv_cache.rotary import Rotary
from kv_cache.scales import LayerScales
from tests.kv_cache.empty_pages import empty_pages, slots_of
from tests.kv_cache.random_scales import MAX_POSITION, random_scales

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU = torch.device("cpu")
BITS = ((8, 8), (6, 6), (4, 4), (4, 3), (3, 3), (2, 8), (8, 2), (3, 6))
"""Of keys and of values; every number of bits on both sides."""
SLACK = 2.0**-13
"""Of a transformed key, in parts of its largest channel: 16 bits of each key, sums of float32."""
HEADS, BLOCKS, BLOCK = 3, 5, 16


def served(bits: tuple[int, int], dim: int) -> bool:
    return dim % 32 == 0 or 3 not in bits


def moved(cache: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of pages on another device, with what lies between them."""
    size = cache.untyped_storage().nbytes()
    flat = cache.as_strided((size,), (1,)).to(device, copy=True)
    return flat.as_strided(cache.shape, cache.stride())


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    size = one.untyped_storage().nbytes()
    return torch.equal(one.as_strided((size,), (1,)).cpu(), other.as_strided((size,), (1,)).cpu())


def rows_at(cache: torch.Tensor, layout: PageLayout, slots: torch.Tensor) -> dict[str, torch.Tensor]:
    """What lies in each plane at some slots, [slots, heads, row bytes], as codec.encode returns it."""
    rows = {}
    for name, row in layout.row_bytes.items():
        found = torch.empty(len(slots), cache.shape[1], row, dtype=torch.uint8)
        for index, slot in enumerate(slots.tolist()):
            for head in range(cache.shape[1]):
                page = cache[slot // layout.block_size, head].reshape(-1)
                found[index, head] = codec._plane_view(page, layout, name)[slot % layout.block_size]
        rows[name] = found
    return rows


def codes_of(rows: dict[str, torch.Tensor], kind: str, bits: int) -> torch.Tensor:
    return codec.join_planes([rows[name] for name in rows if name.startswith(kind)], bits)


def assert_codes_are_nearest(y: torch.Tensor, codes: torch.Tensor, meta: torch.Tensor, bits: int) -> None:
    """What keys are coded as, for y as it is in float64.

    Args:
        y: float64 [keys, channels].
        codes: uint8 of y's shape.
        meta: uint8 [keys, 2], scale and zero.
        bits: of a code.

    """
    scale, zero = meta.unbind(-1)
    low, high = y.amin(-1).clamp_max(0), y.amax(-1).clamp_min(0)
    slack = SLACK * y.abs().amax(-1)
    to_scale, to_zero, gain = codec.factors(bits)
    least, most = (codec.encode_scale(((high - low + sign * 2 * slack) * to_scale).float()) for sign in (-1, 1))
    assert ((least <= scale) & (scale <= most)).all()
    inverse = codec.inverse_step(scale, bits).double()
    wanted = (-low * inverse * to_zero).clamp(0, 255)
    off = (wanted - zero).abs()
    assert (off <= 0.5 + slack * inverse * 2.0 ** (8 - bits)).all()
    scaled = (y * gain * inverse[..., None] + (zero.double() * 2.0 ** (bits - 8))[..., None]).clamp(0, 2**bits - 1)
    off = (scaled - codes).abs()
    assert (off <= 0.5 + (slack * inverse)[..., None]).all()


def check_store(
    fmt: KVFormat, dim: int, device: torch.device, tokens: int, dtype: torch.dtype, rotary: Rotary | None = None
) -> None:
    """Store random tokens among others, some of them nowhere, some at position 0, and one that is not finite."""
    layout, scales = PageLayout(fmt, dim, BLOCK), random_scales(HEADS, dim)
    scales = dataclasses.replace(scales, rotary=rotary or scales.rotary)
    layer = LayerConstants.of(layout, scales, device, MAX_POSITION)
    want = empty_pages(layout, BLOCKS, HEADS, padded=tokens % 2 == 1)
    cache = moved(want, device)
    key, value = (torch.randn(tokens + 4, HEADS + 2, dim).mul(2).to(dtype)[:, 1 : 1 + HEADS] for _ in range(2))
    key *= torch.rand(tokens + 4, HEADS, 1) * 3
    value *= torch.rand(tokens + 4, HEADS, 1) * 3
    key[0, 0, 5], key[0, 1, 7], value[0, 0, 0], value[0, 2, -1] = torch.nan, torch.inf, -torch.inf, torch.nan
    if dtype == torch.float32:
        key[0, 2, 3] = -1e30
    slots, positions = torch.randperm(BLOCKS * BLOCK)[:tokens], torch.randint(MAX_POSITION, (tokens,))
    slots[1:][torch.rand(tokens - 1) < 0.1] = -1
    positions[torch.rand(tokens) < 0.2] = 0
    on_device = [x.to(device) for x in (key, value, slots, torch.where(slots < 0, 2**40, positions))]
    store(layer, cache, *on_device)

    codec.write_pages(want, key[:tokens], value[:tokens], slots, layout, scales, positions)
    stored = slots >= 0
    got = moved(cache, CPU)
    rows, expected = (rows_at(pages, layout, slots[stored]) for pages in (got, want))
    # Of the first token, keys of two heads are not finite, and one number swamps all else in the third's, if it can.
    ordinary = torch.ones(int(stored.sum()), HEADS, dtype=torch.bool)
    ordinary[0, : 3 if dtype == torch.float32 else 2] = False
    for name in rows:
        if name.startswith("value"):
            assert torch.equal(rows[name], expected[name]), name
        assert torch.equal(rows[name][~ordinary], expected[name][~ordinary]), name
    assert torch.equal(rows[META][..., 2:], expected[META][..., 2:])
    centred = (key[:tokens].float() - codec.centres(scales, positions))[stored].double()
    y = torch.einsum("hcd,thd->thc", scales.key_transform.double(), centred)[ordinary]
    codes = [codes_of(x, "key", fmt.key_bits)[ordinary] for x in (rows, expected)]
    meta = [x[META][ordinary][:, :2] for x in (rows, expected)]
    assert_codes_are_nearest(y, codes[0], meta[0], fmt.key_bits)
    errors = [
        (codec.dequantize(c, *m.unbind(-1), fmt.key_bits, torch.float64) - y).norm()
        for c, m in zip(codes, meta, strict=True)
    ]
    assert errors[0] <= errors[1] * 1.01
    # Nothing else was touched: with the specification's bytes in these slots all are the same.
    codec.write_pages(got, key[:tokens], value[:tokens], slots, layout, scales, positions)
    assert same_bytes(got, want)


def check_gather(
    fmt: KVFormat, dim: int, device: torch.device, dtype: torch.dtype, rotary: Rotary | None = None, block: int = BLOCK
) -> None:
    """Gather what lies in pages beside fresh tokens, of four requests."""
    layout, scales = PageLayout(fmt, dim, block), random_scales(HEADS, dim)
    scales = dataclasses.replace(scales, rotary=rotary or scales.rotary)
    layer = LayerConstants.of(layout, scales, device, MAX_POSITION)
    earlier, new = [2 * block + 5, 0, 1, 3 * block], [5, 40, 1, 0]
    table = torch.tensor([[3, 0, 4], [99, 99, 99], [1, 99, 99], [7, 2, 6]], dtype=torch.int32)
    pages = empty_pages(layout, 8, HEADS, True)
    for request, length in enumerate(earlier):
        at = torch.arange(length)
        slots = slots_of(table[request], length, block)
        key, value = torch.randn(2, length, HEADS, dim).mul(torch.rand(2, length, HEADS, 1) * 3)
        codec.write_pages(pages, key, value, slots, layout, scales, at)
    cache, tiles = moved(pages, device), plan(earlier, new).to(device)
    fresh = torch.randn(sum(new) + 2, 7, dim, device=device).to(dtype)[:, 1 : 1 + 2 * HEADS].split(HEADS, 1)
    shape = (sum(earlier) + sum(new) + 3, HEADS, dim)
    out = tuple(torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in "kv")
    gather(layer, cache, out, fresh, table.to(device), tiles)
    keys, values = (x.cpu() for x in out)
    row = taken = 0
    for request, (before, count) in enumerate(zip(earlier, new, strict=True)):
        for head in range(HEADS):
            if not before:
                continue
            exact, rounded = (
                [
                    codec.read_page(pages[b, head].reshape(-1), layout, scales, head, block * i, precision)[kind]
                    for i, b in enumerate(table[request, : -(-before // block)].tolist())
                ]
                for kind, precision in enumerate((torch.float64, torch.float32))
            )
            assert torch.equal(values[row : row + before, head], torch.cat(rounded)[:before].to(dtype))
            want = torch.cat(exact)[:before]
            # A short key is the difference of its centre and of what its codes mean, both long.
            size = want.norm(dim=-1) + codec.centres(scales, torch.arange(before))[:, head].double().norm(dim=-1)
            error = (keys[row : row + before, head].double() - want).norm(dim=-1) / size
            assert error.max() < (4e-3 if dtype == torch.bfloat16 else 6e-4)
        row += before
        for index in range(2):
            assert torch.equal(out[index][row : row + count], fresh[index][taken : taken + count])
        row, taken = row + count, taken + count
    for whole in (keys, values):
        assert whole[row:].isnan().all()
        assert not whole[:row].isnan().any()


ROTARIES = {
    "none": Rotary.over(64, None, MAX_POSITION),
    "5 of 32 pairs": Rotary.over(64, torch.rand(5), MAX_POSITION),
    "10 of 32 pairs": Rotary.over(64, torch.rand(10), MAX_POSITION),
    "10 of 32 pairs, interleaved": Rotary.over(64, torch.rand(10), MAX_POSITION, interleaved=True),
}
"""What random_scales does not have."""
STORES = ((50, torch.bfloat16), (16, torch.float16), (1, torch.float32), (33, torch.float32))


class TestOnADevice:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def device(self, fresh_numbers):
        return torch.device("cuda", 0)

    @pytest.fixture(params=["few tokens", "many tokens"])
    def share(self, request, monkeypatch):
        """How blocks share the work: as while decoding, or as in a long prompt."""
        from kv_cache.cuda import store as module

        if request.param == "many tokens":
            _, shared, overlap = module.device_limits(torch.device("cuda", 0))
            monkeypatch.setattr(module, "device_limits", lambda device: (2, shared, overlap))

    @pytest.mark.parametrize("dim", HEAD_SIZES)
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.usefixtures("share")
    def test_store(self, bits, dim, device):
        if served(bits, dim):
            for tokens, dtype in STORES:
                check_store(layer_format(*bits), dim, device, tokens, dtype)

    @pytest.mark.parametrize("dim", HEAD_SIZES)
    @pytest.mark.parametrize("bits", BITS)
    def test_gather(self, bits, dim, device):
        if served(bits, dim):
            for dtype, block in ((torch.bfloat16, 16), (torch.float16, 48)):
                check_gather(layer_format(*bits), dim, device, dtype, block=block)

    @pytest.mark.parametrize("rotary", ROTARIES)
    @pytest.mark.usefixtures("share")
    def test_other_rotary_embeddings(self, rotary, device):
        for tokens, dtype in STORES:
            check_store(FORMATS["int4_per_head"], 64, device, tokens, dtype, ROTARIES[rotary])
        check_gather(FORMATS["int4_per_head"], 64, device, torch.float16, ROTARIES[rotary])


def made(dim: int = 64, name: str = "int4_per_head") -> tuple[PageLayout, LayerScales]:
    return PageLayout(FORMATS[name], dim, BLOCK), random_scales(HEADS, dim)


def test_what_does_not_fit_is_refused():
    layout, scales = made()
    layer = LayerConstants.of(layout, scales, CPU)
    cache = empty_pages(layout, 1, HEADS, False)
    x, slots = torch.randn(2, HEADS, 64), torch.arange(2)
    with pytest.raises(ParetoError, match="position of every token"):
        store(layer, cache, x, x, slots, slots[:1])
    with pytest.raises(ParetoError, match="both be float32, bfloat16 or float16"):
        store(layer, cache, x, x.half(), slots, slots)
    with pytest.raises(ParetoError, match=r"pages must be uint8 \[blocks, 3, 16, 68\]"):
        store(layer, empty_pages(layout, 1, HEADS + 1, False), x, x, slots, slots)
    with pytest.raises(ParetoError, match="do not fit head size 128"):
        LayerConstants.of(PageLayout(FORMATS["int4_per_head"], 128, BLOCK), scales, CPU)
    with pytest.raises(ParetoError, match="bfloat16 numbers"):
        LayerConstants.of(layout, dataclasses.replace(scales, key_transform=scales.key_transform / 3), CPU)
    with pytest.raises(ParetoError, match="to gather must be"):
        gather(layer, cache, (x, x), (x, x), slots[None].int(), plan([1], [1]))


def test_tiles_lie_in_one_page():
    tiles = plan([0, 37, 16], [20, 3, 0])
    assert tiles.tolist() == [
        [-1, 0, 16, 0], [-1, 16, 4, 16], [1, 0, 16, 20], [1, 16, 16, 36], [1, 32, 5, 52], [-1, 20, 3, 57],
        [2, 0, 16, 60],
    ]  # fmt: skip
