"""The CUDA kernels that write and read pages against the specification: codes bit for bit."""

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


def on_gpu(cache: torch.Tensor) -> torch.Tensor:
    size = cache.untyped_storage().nbytes()
    flat = cache.as_strided((size,), (1,)).cuda()
    return flat.as_strided(cache.shape, cache.stride())


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("name", CODINGS)
def test_store_equals_the_codec(name, dim):
    from kv_cache.gpu.read import plan, read
    from kv_cache.gpu.store import store

    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    layout, scales = PageLayout(coding(name)[0], dim, 16), random_scales(name, 3, dim)
    sides = sides_of(layout, 3, scales)
    for dtype, padded, tokens in ((torch.bfloat16, True, 50), (torch.float16, False, 16), (torch.float32, False, 1)):
        want = empty_pages(layout, 5, 3, padded)
        cache = on_gpu(want)
        key, value = (torch.randn(tokens + 4, 5, dim).mul(2).to(dtype)[:, 1:4] for _ in range(2))
        if dtype == torch.float32:
            key[0, 0, 5], key[0, 1, 7], value[0, 0, 0], value[0, 2, -1] = float("nan"), 1e30, float("-inf"), 7e4
        slots, positions = torch.randperm(80)[:tokens], torch.randint(MAX_POSITION, (tokens,))
        slots[torch.rand(tokens) < 0.1] = -1
        codec.write_pages(want, key[:tokens], value[:tokens], slots, layout, scales, positions)
        store(layout, sides, cache, key.cuda(), value.cuda(), slots.cuda(), positions.cuda())
        size = want.untyped_storage().nbytes()
        different = (cache.as_strided((size,), (1,)).cpu() != want.as_strided((size,), (1,))).sum().item()
        assert different == 0, f"{different} of {size} bytes differ for {dtype}"

    # Read back what lies in the pages, as two requests of 37 and 33 tokens with a gap between their rows.
    page_codes = empty_pages(layout, 5, 3, True)
    lengths, rows, table = [37, 33], [0, 40], torch.tensor([[3, 0, 4], [1, 2, 0]], dtype=torch.int32)
    for request, length in enumerate(lengths):
        key, value = torch.randn(length, 3, dim), torch.randn(length, 3, dim)
        at = torch.arange(length)
        slots = table[request].long()[at // 16] * 16 + at % 16
        codec.write_pages(page_codes, key, value, slots, layout, scales, at)
    cache = on_gpu(page_codes)
    for dtype in (torch.bfloat16, torch.float16):
        for index, side in enumerate(sides):
            out = torch.full((80, 3, dim), float("nan"), dtype=dtype, device="cuda")
            read(side, cache, out, table.cuda(), plan(lengths, rows).cuda())
            assert out[37:40].isnan().all()
            assert out[73:].isnan().all()
            for request, (length, row) in enumerate(zip(lengths, rows, strict=True)):
                for head in range(3):
                    read_pages = [
                        codec.read_page(page_codes[b, head].reshape(-1), layout, scales, head, torch.float64, 16 * i)
                        for i, b in enumerate(table[request].tolist())
                    ]
                    want = torch.cat([both[index] for both in read_pages])[:length]
                    got = out[row : row + length, head].double().cpu()
                    assert (got - want).norm() / want.norm() < (3e-3 if dtype == torch.bfloat16 else 4e-4)


def sides_of(layout, kv_heads, scales):
    from kv_cache.gpu.sides import make_side

    return tuple(make_side(kind, layout, kv_heads, scales, torch.device("cuda", 0)) for kind in ("key", "value"))


def test_centred_keys_need_positions():
    from kv_cache.gpu.store import store

    layout, scales = PageLayout(coding("int4_per_head")[0], 64, 16), random_scales("int4_per_head+centred", 1, 64)
    x = torch.randn(2, 1, 64, device="cuda")
    cache = on_gpu(empty_pages(layout, 1, 1, False))
    with pytest.raises(ParetoError, match="position of every token"):
        store(layout, sides_of(layout, 1, scales), cache, x, x, torch.arange(2, device="cuda"))
