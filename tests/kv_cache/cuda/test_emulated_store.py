"""The kernels that write and read pages, their own source run on a CPU (emulator/), against the specification."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kv_cache.cuda import read, store
from kv_cache.cuda.constants import LayerConstants
from kv_cache.formats import FORMATS, HEAD_SIZES, KVFormat
from kv_cache.layout import PageLayout
from tests.kv_cache.cuda.emulator import DEVICE, PROCESSORS, SHARED_BYTES, EmulatedKernel, emulated
from tests.kv_cache.cuda.test_beside_store import DecodeStep
from tests.kv_cache.cuda.test_store import BITS, ROTARIES, STORES, check_gather, check_store
from tests.kv_cache.empty_pages import empty_pages
from tests.kv_cache.random_scales import random_scales

__all__ = ["emulated"]
pytestmark = pytest.mark.usefixtures("emulated", "fresh_numbers")


@pytest.fixture
def few_tokens(monkeypatch):
    """So many processors that keys and values have blocks of their own, as while decoding."""
    for module in (store, read):
        monkeypatch.setattr(module, "device_limits", lambda device: (100 * PROCESSORS, SHARED_BYTES, True))


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("bits", [(4, 4), pytest.param((8, 8), marks=pytest.mark.long)])
def test_every_head_size(bits, dim):
    for (tokens, dtype), output in zip(STORES[:2], (torch.float16, torch.bfloat16), strict=True):
        check_store(KVFormat("these bits", *bits), dim, DEVICE, tokens, dtype)
        check_gather(KVFormat("these bits", *bits), dim, DEVICE, output)


@pytest.mark.parametrize("dim", [96, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("few_tokens")
def test_every_number_of_bits(bits, dim):
    check_store(KVFormat("these bits", *bits), dim, DEVICE, *STORES[3])
    check_gather(KVFormat("these bits", *bits), dim, DEVICE, torch.float16, block=48)


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.usefixtures("few_tokens")
def test_few_tokens(tokens):
    for dim in HEAD_SIZES:
        check_store(FORMATS["int4_per_head"], dim, DEVICE, tokens, torch.float32)


@pytest.mark.parametrize("rotary", ROTARIES)
def test_other_rotary_embeddings(rotary):
    check_store(FORMATS["int4_per_head"], 64, DEVICE, *STORES[0], ROTARIES[rotary])
    check_gather(FORMATS["int4_per_head"], 64, DEVICE, torch.float16, ROTARIES[rotary])


def test_rows_of_any_stride():
    """Of which neither kernel could read four elements at once."""
    layout, scales = PageLayout(FORMATS["int4_per_head"], 64, 16), random_scales(2, 64)
    layer = LayerConstants.of(layout, scales, DEVICE)
    key, value = torch.randn(2, 20, 2, 67).bfloat16()[..., 1:65].unbind()
    at, table = torch.arange(20), torch.tensor([[1, 0]], dtype=torch.int32)
    slots = table[0, at // 16] * 16 + at % 16
    pages = [empty_pages(layout, 2, 2, False) for _ in range(2)]
    for cache, copied in zip(pages, (False, True), strict=True):
        x = [y.contiguous() if copied else y for y in (key, value)]
        store.store(layer, cache, *x, slots, at)
    assert torch.equal(*pages)
    out = tuple(torch.empty(20, 2, 64, dtype=torch.bfloat16) for _ in "kv")
    read.gather(layer, pages[0], out, (key, value), table, read.plan([0], [20]))
    assert torch.equal(out[0], key)
    assert torch.equal(out[1], value)


@pytest.mark.usefixtures("few_tokens")
def test_attention_beside_the_store():
    step = DecodeStep("int4_per_head", 64, 2, [40, 1, 90], DEVICE)
    step.renew()
    results = []
    for beside in (False, True):
        step.reset()
        assert step.run(beside) == beside
        results.append(step.result())
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_emulator_tells_when_threads_wait_in_vain(tmp_path):
    (tmp_path / "bad.cu").write_text(
        '#include "ptx.cuh"\nstruct Params { int x; };\n'
        'extern "C" __global__ void bad(const __grid_constant__ Params p) {\n'
        "    if (threadIdx.x) __syncthreads(); else __syncwarp();\n}\n"
    )
    kernel = EmulatedKernel("bad.cu", "bad", (), DEVICE, folder=tmp_path)
    with pytest.raises(AssertionError, match="in vain"):
        kernel.launch((1, 1, 1), 64, ctypes.c_int(0), DEVICE)
