"""The study's coders of vLLM's dtypes against vLLM's own kernels, run in Triton's interpreter on the CPU."""

from __future__ import annotations

import math
import os
import sys
from importlib.util import find_spec

import pytest
import torch

from kv_cache.simulate.coder import Run, Sample, Shape
from kv_cache.simulate.lloyd_max import normal_levels
from kv_cache.simulate.per_token_head import Int4PerTokenHead, PerTokenHead
from kv_cache.simulate.turboquant import TurboQuant
from kv_cache.transforms import mixing
from tests.kv_cache.simulate.random_sample import random_sample
from tests.triton_interpreter import run_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOKENS, PAGES, PAGE = 40, 3, 16
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, in a process of its own")


@pytest.mark.skipif(
    INTERPRETED or find_spec("triton") is None or find_spec("vllm") is None, reason="needs Triton, vLLM"
)
def test_coders_agree_with_vllms_kernels():
    assert "5 passed" in run_interpreted(__file__)


@pytest.fixture
def ops():
    """vLLM's modules, imported as if it had found Triton: on a CPU it replaces Triton by a stub."""
    import triton
    import triton.language
    import vllm.triton_utils

    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language
    for name in [name for name in sys.modules if name.startswith("vllm.v1.attention.ops")]:
        del sys.modules[name]
    import vllm.v1.attention.ops.int4_per_token_head
    import vllm.v1.attention.ops.triton_reshape_and_cache_flash
    import vllm.v1.attention.ops.triton_turboquant_store
    from vllm.v1.attention import ops

    return ops


@pytest.fixture
def sample() -> Sample:
    return random_sample(windows=1, tokens=TOKENS)


def rows(cache):
    """A cache [pages, tokens, ...] as [tokens, ...]."""
    return cache.flatten(0, 1)[:TOKENS]


@interpreted
def test_int8(ops, sample):
    from vllm.v1.kv_cache_interface import KVQuantMode

    codes = [torch.zeros(PAGES, PAGE, 2, 64, dtype=torch.int8) for _ in range(2)]
    scales = [torch.zeros(PAGES, PAGE, 2) for _ in range(2)]
    ops.triton_reshape_and_cache_flash.triton_reshape_and_cache_flash_per_token_head_quant(
        sample.key[0], sample.value[0], *codes, *scales, torch.arange(TOKENS), KVQuantMode.INT8_PER_TOKEN_HEAD
    )
    decoded = PerTokenHead(torch.int8).code(0, sample.key, sample.value, Run())
    for code, scale, read in zip(codes, scales, (decoded.key, decoded.value), strict=True):
        torch.testing.assert_close(rows(code) * rows(scale)[..., None], read[0])


@interpreted
def test_int4(ops, sample):
    kernels = ops.int4_per_token_head
    codes = [torch.zeros(PAGES, PAGE, 2, 32, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(PAGES, PAGE, 2) for _ in range(2)]
    kernels.reshape_and_cache_int4(
        sample.key[0], sample.value[0], *codes, torch.arange(TOKENS), k_scale_cache=scales[0], v_scale_cache=scales[1]
    )
    decoded = Int4PerTokenHead().code(0, sample.key, sample.value, Run())
    for code, scale, read in zip(codes, scales, (decoded.key, decoded.value), strict=True):
        packed = rows(scale).contiguous().view(torch.int32)
        nibbles = torch.stack([rows(code) & 15, rows(code) >> 4], -1).flatten(-2)
        mixed = (nibbles - (packed & 15)[..., None]) * (packed & -16).view(torch.float32)[..., None]
        error = (kernels.single_rht(mixed, inverse=True) / 64 - read[0]).abs().amax(-1)
        assert (error > 1e-3).float().mean() < 0.05  # a sum in another order may move a code


def numbers(packed, bits):
    """Packed codes of 3 or 4 bits, from the lowest bits on."""
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    words = (packed.unflatten(-1, (-1, 3)).int() << torch.tensor([0, 8, 16])).sum(-1)
    return ((words[..., None] >> (3 * torch.arange(8))) & 7).flatten(-2).long()


@interpreted
@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (3, 4), (3, 3)])
def test_turboquant(ops, sample, key_bits, value_bits):
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    config = TurboQuantConfig(64, key_bits, value_bits, norm_correction=True)
    levels = (normal_levels(key_bits) / 8).float()
    # vLLM integrates numerically, with 200 trapezoids between two borders.
    torch.testing.assert_close(get_centroids(64, key_bits), levels, rtol=0, atol=3e-4)
    cache = torch.zeros(PAGES, PAGE, 2, config.slot_size_aligned, dtype=torch.uint8)
    hadamard = mixing(64).float()
    ops.triton_turboquant_store.triton_turboquant_store(
        sample.key[0], sample.value[0], cache, torch.arange(TOKENS), hadamard, (levels[1:] + levels[:-1]) / 2,
        mse_bits=key_bits, key_packed_size=config.key_packed_size, value_quant_bits=value_bits,
    )  # fmt: skip
    coder = TurboQuant(key_bits, value_bits, boundary=0)
    coder.fit(0, sample)
    decoded = coder.code(0, sample.key, sample.value, Run())

    slot, size = rows(cache), 8 * key_bits
    directions = levels[numbers(slot[..., :size], key_bits)]
    directions = directions / directions.square().sum(-1, keepdim=True).sqrt()
    key = directions @ hadamard * slot[..., size : size + 2].contiguous().view(torch.float16).float()
    start, size = config.key_packed_size, 8 * value_bits
    ends = slot[..., start + size : start + size + 4].contiguous().view(torch.float16).float()
    value = numbers(slot[..., start : start + size], value_bits) * ends[..., :1] + ends[..., 1:]
    for made, read in ((key, decoded.key[0]), (value, decoded.value[0])):
        error = (made - read).abs().amax(-1) / read.norm(dim=-1) * math.sqrt(64)
        assert error.median() < 1e-3
        assert (error > 1e-2).float().mean() < 0.05
    assert coder.bits(Shape(4, 2, 64), 4096) == config.slot_size_aligned * 8 / 128
