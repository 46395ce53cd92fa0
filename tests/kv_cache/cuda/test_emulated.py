"""The CUDA kernels' own source, run on a CPU (emulator/), against the specification: their logic, without a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kv_cache.cuda import decode, read, store
from tests.kv_cache.cuda.emulator import DEVICE, PROCESSORS, SHARED_BYTES, emulated
from tests.kv_cache.cuda.random_batch import Batch
from tests.kv_cache.cuda.test_beside_store import DecodeStep
from tests.kv_cache.cuda.test_decode import check
from tests.kv_cache.cuda.test_store import check_store_and_gather
from tests.kv_cache.random_scales import CODINGS, coding, random_scales

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


@pytest.mark.parametrize("name", [name for name in CODINGS if coding(name)[0].static])
def test_decode(name):
    scales = random_scales(name, 2, 64)
    batch = Batch.make(
        name.partition("+")[0], [1, 33, 700, 0], [1, 1, 1, 0], dim=64, device="cpu", scales=scales, dtype=torch.float16
    )
    check(batch, 1.5)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"dim": 128, "query_lens": [3, 1, 2]}, {"window": 100}),
        ({"dim": 80, "query_lens": [1, 1, 1], "group": 1}, {"soft_cap": 30.0}),
        ({"dim": 256, "query_lens": [1, 2, 1], "block": 48, "padded": True}, {}),
        ({"dim": 96, "query_lens": [1, 5, 1], "group": 7, "dtype": torch.bfloat16}, {"bias": 1.0}),
    ],
)
def test_decode_of_other_shapes(settings, more):
    settings = {"dtype": torch.float16, "lens": [400, 17, 65], "device": "cpu"} | settings
    check(Batch.make("int4_per_head", **settings, **more), 2.0)


@pytest.mark.parametrize("name", ["int4_per_head+centred", "int8_per_head"])
def test_decode_as_ampere_copies(name, monkeypatch):
    monkeypatch.setattr(decode, "cuda_device", lambda layout, device: (device, (8, 0)))
    scales = random_scales(name, 2, 128)
    batch = Batch.make(
        name.partition("+")[0], [300, 18], [1, 2], block=32, device="cpu", scales=scales, dtype=torch.float16
    )
    assert not batch.attention().tuning.bulk_copy
    check(batch, 1.5)


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
