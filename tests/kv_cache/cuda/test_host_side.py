"""What of the kernels that write and read pages runs without a device: compilation for devices that are not there."""

from __future__ import annotations

import pytest
import torch

from kv_cache.cuda import read, store
from kv_cache.cuda.constants import LayerConstants
from kv_cache.cuda.launch import SOURCES
from kv_cache.cuda.runtime import nvrtc
from kv_cache.formats import FORMATS
from kv_cache.layout import PageLayout
from tests.kv_cache.cuda.devices import SHARED
from tests.kv_cache.random_scales import random_scales

CPU = torch.device("cpu")
SHAPES = [*((name, 128) for name in FORMATS), *(("int4_per_head", dim) for dim in (64, 80, 96, 256))]


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize(("name", "dim"), SHAPES)
def test_store_and_read_compile_and_fit(name, dim, capability, monkeypatch):
    """Everything that a layer launches is loaded ahead, for devices that are not there."""
    loaded = []

    def load_kernel(source, kernel, macros, device, shared_bytes=0, one_block=False):
        assert nvrtc.compile_cubin(source, f"sm_{capability[0]}{capability[1]}", tuple(macros), SOURCES)
        assert shared_bytes <= SHARED[capability]
        loaded.append(source)

    layer = LayerConstants.of(PageLayout(FORMATS[name], dim, 16), random_scales(2, dim), CPU)
    for module in (store, read):
        monkeypatch.setattr(module, "load_kernel", load_kernel)
        monkeypatch.setattr(module, "device_limits", lambda device: (132, SHARED[capability], capability >= (9, 0)))
        module.preload(layer, torch.bfloat16, CPU)
    assert loaded == ["store.cu", "store.cu", "read.cu"]


def test_what_is_preloaded_is_what_is_launched(monkeypatch):
    """So that no request waits for a compiler."""
    asked, launched = set(), set()

    class Kernel:
        def launch(self, grid, threads, params, device, overlap):
            pass

    def kernels(seen):
        def load_kernel(*arguments):
            seen.add(arguments)
            return Kernel()

        return load_kernel

    layer = LayerConstants.of(PageLayout(FORMATS["int4_per_head"], 128, 16), random_scales(2, 128), CPU)
    monkeypatch.setattr(store, "device_limits", lambda device: (132, 227 << 10, True))
    monkeypatch.setattr(store, "load_kernel", kernels(asked))
    store.preload(layer, torch.float16, CPU)
    monkeypatch.setattr(store, "load_kernel", kernels(launched))
    cache = torch.zeros(1, 2, 16, layer.layout.bytes_per_token, dtype=torch.uint8)
    for tokens in (1, 16, 100, 1024, 1056, 1057, 9000):
        x, at = torch.zeros(tokens, 2, 128, dtype=torch.float16), torch.zeros(tokens, dtype=torch.int64)
        # Beside so few tokens that their blocks have multiprocessors of their own, attention may start.
        assert store.store(layer, cache, x, x, at, at) == (tokens <= 132 // 2 * store.TOKENS)
    assert launched == asked
