"""The CUDA kernels that write and read pages, run on a CPU (emulator/): their logic, without a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kv_cache.cuda import read, store
from tests.kv_cache.cuda.emulator import DEVICE, PROCESSORS, SHARED_BYTES, emulated
from tests.kv_cache.cuda.test_beside_store import DecodeStep
from tests.kv_cache.cuda.test_store import check_store_and_gather
from tests.kv_cache.random_scales import CODINGS

__all__ = ["emulated"]
pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CODINGS)
def test_store_and_gather(name, dim):
    check_store_and_gather(name, dim, DEVICE)


@pytest.mark.parametrize("dim", [80, 96, 256])
def test_other_head_sizes(dim):
    check_store_and_gather("int4_per_head+centred", dim, DEVICE)


@pytest.mark.parametrize("name", ["int4_per_head+centred", "k8v4_per_head+feedback", "int6_per_head"])
def test_a_block_for_few_tokens(name, monkeypatch):
    """So many processors that a whole block codes the same tokens, as while decoding."""
    for module in (store, read):
        monkeypatch.setattr(module, "device_limits", lambda device: (100 * PROCESSORS, SHARED_BYTES, True))
    check_store_and_gather(name, 128, DEVICE)


@pytest.mark.parametrize("name", ["int4_per_head+centred", "int8_per_head"])
def test_attention_beside_the_store(name):
    step = DecodeStep(name, 64, 2, [40, 1, 90], DEVICE)
    step.renew()
    results = []
    for beside in (False, True):
        step.reset()
        assert step.run(beside) == beside
        results.append(step.result())
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_emulator_tells_when_threads_wait_in_vain(tmp_path):
    from tests.kv_cache.cuda import emulator

    (tmp_path / "bad.cu").write_text(
        '#include "ptx.cuh"\nstruct Params { int x; };\n'
        'extern "C" __global__ void bad(const __grid_constant__ Params p) {\n'
        "    if (threadIdx.x) __syncthreads(); else __syncwarp();\n}\n"
    )
    kernel = emulator.EmulatedKernel("bad.cu", "bad", (), DEVICE, folder=tmp_path)
    with pytest.raises(AssertionError, match="in vain"):
        kernel.launch((1, 1, 1), 64, ctypes.c_int(0), DEVICE)
