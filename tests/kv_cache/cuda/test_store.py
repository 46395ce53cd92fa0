"""The CUDA kernels that write and read pages against the specification: codes bit for bit, or where they are rounded
with feedback each the nearest to what the specification rounds after the codes before it."""

from __future__ import annotations

import random

import pytest
import torch

from kv_cache import codec
from kv_cache.errors import ParetoError
from kv_cache.formats import HEAD_SIZES
from kv_cache.layout import PageLayout
from tests.kv_cache.empty_pages import empty_pages
from tests.kv_cache.random_scales import CODINGS, MAX_POSITION, coding, random_scales

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


DEVICE = torch.device("cuda", 0)


def moved(cache: torch.Tensor, device: torch.device) -> torch.Tensor:
    size = cache.untyped_storage().nbytes()
    flat = cache.as_strided((size,), (1,)).to(device, copy=True)
    return flat.as_strided(cache.shape, cache.stride())


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("alone", [False, True])
def test_store_and_gather_are_the_codec(name, dim, alone, monkeypatch):
    from kv_cache.cuda import store as module

    if alone:  # Each warp has tokens of its own, as in a long prompt.
        _, shared, overlap = module.device_limits(DEVICE)
        monkeypatch.setattr(module, "device_limits", lambda device: (1, shared, overlap))
    check_store_and_gather(name, dim, DEVICE)


def check_store_and_gather(name: str, dim: int, device: torch.device) -> None:
    """Store random tokens, and gather others, in any coding that random_scales knows."""
    from kv_cache.cuda.read import gather, plan
    from kv_cache.cuda.store import store

    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    layout, scales = PageLayout(coding(name)[0], dim, 16), random_scales(name, 3, dim)
    sides = sides_of(layout, 3, scales, device)
    for dtype, padded, tokens in ((torch.bfloat16, True, 50), (torch.float16, False, 16), (torch.float32, False, 1)):
        want = empty_pages(layout, 5, 3, padded)
        cache = moved(want, device)
        key, value = (torch.randn(tokens + 4, 5, dim).mul(2).to(dtype)[:, 1:4] for _ in range(2))
        if dtype == torch.float32:
            key[0, 0, 5], key[0, 1, 7], value[0, 0, 0], value[0, 2, -1] = float("nan"), 1e30, float("-inf"), 7e4
        slots, positions = torch.randperm(80)[:tokens], torch.randint(MAX_POSITION, (tokens,))
        slots[1:][torch.rand(tokens - 1) < 0.1] = -1
        codec.write_pages(want, key[:tokens], value[:tokens], slots, layout, scales, positions)
        store(layout, sides, cache, *(x.to(device) for x in (key, value, slots, positions)))
        if tokens and sides[1].tiled and "feedback" in sides[1].tensors:
            stored = slots >= 0
            flat = cache.as_strided((want.untyped_storage().nbytes(),), (1,)).cpu()
            got = flat.as_strided(cache.shape, cache.stride())
            x = {"key": key[:tokens][stored], "value": value[:tokens][stored]}
            for kind, side in zip(x, sides, strict=True):
                codes = codes_at(got, layout, slots[stored], kind)
                if "feedback" in side.tensors:
                    assert_nearest(codes, x[kind], scales, kind, positions[stored])
                else:
                    bits = layout.fmt.key_bits if kind == "key" else layout.fmt.value_bits
                    assert torch.equal(codes, codec.quantize_side(x[kind], scales, kind, bits, None))
            # Nothing else was touched: with the right codes written over them, all bytes are the specification's.
            codec.write_pages(got, key[:tokens], value[:tokens], slots, layout, scales, positions)
            cache = got
        size = want.untyped_storage().nbytes()
        different = (cache.as_strided((size,), (1,)).cpu() != want.as_strided((size,), (1,))).sum().item()
        assert different == 0, f"{different} of {size} bytes differ for {dtype}"

    # Gather what lies in the pages and some fresh tokens, of three requests.
    page_codes = empty_pages(layout, 5, 3, True)
    earlier, new, table = [37, 0, 33], [5, 40, 1], torch.tensor([[3, 0, 4], [0, 0, 0], [1, 2, 0]], dtype=torch.int32)
    for request, length in enumerate(earlier):
        if length:
            key, value = torch.randn(length, 3, dim), torch.randn(length, 3, dim)
            at = torch.arange(length)
            slots = table[request].long()[at // 16] * 16 + at % 16
            codec.write_pages(page_codes, key, value, slots, layout, scales, at)
    cache, tiles = moved(page_codes, device), plan(earlier, new).to(device)
    for dtype in (torch.bfloat16, torch.float16):
        fresh = torch.randn(sum(new) + 2, 7, dim, device=device).to(dtype)[:, 1:7].split(3, 1)
        out = [
            torch.full((sum(earlier) + sum(new) + 3, 3, dim), float("nan"), dtype=dtype, device=device) for _ in "kv"
        ]
        gather(layout, sides, cache, (out[0], out[1]), fresh, table.to(device), tiles)
        for index in range(2):
            row = taken = 0
            for request, (before, count) in enumerate(zip(earlier, new, strict=True)):
                for head in range(3):
                    pages = [
                        codec.read_page(page_codes[b, head].reshape(-1), layout, scales, head, torch.float64, 16 * i)
                        for i, b in enumerate(table[request].tolist())
                    ]
                    want = torch.cat([both[index] for both in pages])[:before]
                    got = out[index][row : row + before, head].double().cpu()
                    assert before == 0 or (got - want).norm() / want.norm() < (
                        3e-3 if dtype == torch.bfloat16 else 4e-4
                    )
                row += before
                assert torch.equal(out[index][row : row + count], fresh[index][taken : taken + count])
                row, taken = row + count, taken + count
            assert out[index][row:].isnan().all()


def codes_at(cache, layout, slots, kind):
    """Return the codes [slots, heads, head_dim] of keys or values."""
    bits = layout.fmt.key_bits if kind == "key" else layout.fmt.value_bits
    codes = []
    for block, offset in zip((slots // layout.block_size).tolist(), (slots % layout.block_size).tolist(), strict=True):
        heads = []
        for head in range(cache.shape[1]):
            page = cache[block, head].reshape(-1)
            planes = {name: codec._plane_view(page, layout, name) for name, row in layout.row_bytes().items() if row}
            heads.append(codec._codes(kind, planes, bits)[offset])
        codes.append(torch.stack(heads))
    return torch.stack(codes)


def assert_nearest(codes, x, scales, kind, positions):
    """Each code is the nearest to its channel after the errors of the codes before it, in float64, or next to a tie."""
    codes, x = codes.double(), x.double()
    scale, zero, feedback = (getattr(scales, f"{kind}_{part}").double() for part in ("scale", "zero", "feedback"))
    encode = (
        scales.key_encode.double() if kind == "key" and scales.key_encode is not None else torch.diag_embed(1 / scale)
    )
    if kind == "key" and scales.key_mean is not None:
        x = x - codec.centres(scales, positions).double()
    scaled = torch.einsum("hcd,thd->thc", encode, x) + zero
    magnitude = torch.einsum("hcd,thd->thc", encode.abs(), x.abs()) + zero.abs()
    for i in reversed(range(x.shape[-1])):
        error = scaled[..., i] - codes[..., i]
        top = 15
        off = (scaled[..., i].clamp(0, top) - codes[..., i]).abs()
        finite = x.isfinite().all(-1)
        slack = 2.0**-12 * magnitude.amax(-1)
        assert (off <= 0.5 + slack)[finite].all(), f"channel {i}: {(off - 0.5 - slack)[finite].max()}"
        assert (codes[..., i] == 0)[~finite & x.isnan().any(-1) & scaled[..., i].isnan()].all()
        scaled[..., :i] += feedback[:, i, :i] * error[..., None]
        magnitude[..., :i] += (feedback[:, i, :i] * error[..., None]).abs()


def sides_of(layout, kv_heads, scales, device):
    from kv_cache.cuda.sides import make_side

    return tuple(make_side(kind, layout, kv_heads, scales, device) for kind in ("key", "value"))


def test_centred_keys_need_positions():
    from kv_cache.cuda.store import store

    layout, scales = PageLayout(coding("int4_per_head")[0], 64, 16), random_scales("int4_per_head+centred", 1, 64)
    x = torch.randn(2, 1, 64, device=DEVICE)
    cache = moved(empty_pages(layout, 1, 1, False), DEVICE)
    with pytest.raises(ParetoError, match="position of every token"):
        store(layout, sides_of(layout, 1, scales, DEVICE), cache, x, x, torch.arange(2, device=DEVICE))
