"""The low-bit kernel's source on a CPU."""

import pytest
import torch

from quant_methods.kernels import low_bit_matrix
from tests.kv_cache.cuda.emulator import EmulatedKernel


@pytest.fixture
def emulated(monkeypatch):
    """The device whose kernels are emulated."""
    monkeypatch.setattr(low_bit_matrix, "load_kernel", EmulatedKernel)
    monkeypatch.setattr(low_bit_matrix, "device_limits", lambda device: (3, 227 << 10, True))
    caches = low_bit_matrix._arrivals, low_bit_matrix._arrangement
    for cache in caches:
        cache.cache_clear()
    yield torch.device("cpu")
    for cache in caches:
        cache.cache_clear()
