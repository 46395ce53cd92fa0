"""The kernels that write and read pages, their own source run on a CPU (emulator/), against the specification."""

from __future__ import annotations

import pytest
import torch

from kv_cache.cuda import read, store
from kv_cache.formats import FORMATS, HEAD_SIZES, layer_format
from tests.kv_cache.cuda.emulator import DEVICE, PROCESSORS, SHARED_BYTES, emulated
from tests.kv_cache.cuda.test_store import BITS, ROTARIES, STORES, check_gather, check_store, seeded, served

__all__ = ["emulated"]
pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture(autouse=True)
def seed():
    seeded()


@pytest.fixture
def few_tokens(monkeypatch):
    """So many processors that keys and values have blocks of their own, as while decoding."""
    for module in (store, read):
        monkeypatch.setattr(module, "device_limits", lambda device: (100 * PROCESSORS, SHARED_BYTES, True))


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("bits", [(4, 4), (8, 8)])
def test_every_head_size(bits, dim):
    for (tokens, dtype), output in zip(STORES[:2], (torch.float16, torch.bfloat16), strict=True):
        check_store(layer_format(*bits), dim, DEVICE, tokens, dtype)
        check_gather(layer_format(*bits), dim, DEVICE, output)


@pytest.mark.parametrize("dim", [96, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("few_tokens")
def test_every_number_of_bits(bits, dim):
    check_store(layer_format(*bits), dim, DEVICE, *STORES[3])
    check_gather(layer_format(*bits), dim, DEVICE, torch.float16, block=48)


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.usefixtures("few_tokens")
def test_few_tokens(tokens):
    for dim in HEAD_SIZES:
        check_store(FORMATS["int4_per_head"], dim, DEVICE, tokens, torch.float32)


@pytest.mark.parametrize("rotary", ROTARIES)
def test_other_rotary_embeddings(rotary):
    check_store(FORMATS["int4_per_head"], 64, DEVICE, *STORES[0], ROTARIES[rotary])
    check_gather(FORMATS["int4_per_head"], 64, DEVICE, torch.float16, ROTARIES[rotary])


def test_unaligned_rows_are_copied():
    assert served((4, 4), 80)
    check_store(FORMATS["int4_per_head"], 80, DEVICE, *STORES[0])
