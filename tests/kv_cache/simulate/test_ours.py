"""The study's coder of this project's formats against the specification, kv_cache/codec.py."""

import pytest
import torch

from kv_cache import batched, codec
from kv_cache.layout import PageLayout
from kv_cache.simulate.coder import Run, Shape
from kv_cache.simulate.ours import Ours
from kv_cache.simulate.registry import all_formats
from tests.kv_cache.simulate.random_sample import random_sample


@pytest.mark.parametrize("fmt", [f for f in all_formats() if f.key_bits >= f.value_bits], ids=lambda f: f.name)
def test_what_is_read_back_is_what_pages_hold(fmt):
    sample = random_sample()
    coder = Ours(fmt)
    coder.fit(0, sample)
    key, value = sample.key[:1, :48], sample.value[:1, :48]
    decoded = coder.code(0, key, value, Run())
    layout = PageLayout(fmt, 64, 16)
    cache = torch.randint(0, 256, (3, 2, 16, layout.bytes_per_token), dtype=torch.uint8)
    codec.write_pages(cache, key[0], value[0], torch.arange(48), layout, sample.scales, torch.arange(48))
    for head in range(2):
        pages = [codec.read_page(cache[b, head].reshape(-1), layout, sample.scales, head, b * 16) for b in range(3)]
        for read, made in zip(zip(*pages, strict=True), (decoded.key, decoded.value), strict=True):
            error = (torch.cat(read) - made[0, :, head]).abs().amax(-1)
            # A sum in another order moves a number over the middle between two codes now and then.
            assert error.median() < 1e-4
            assert (error > 1e-2).float().mean() <= 0.05


def test_eight_bits_are_near_identity_and_fewer_are_worse():
    sample = random_sample()
    errors = []
    for bits in (8, 6, 4, 3, 2):
        coder = Ours(next(f for f in all_formats() if f.key_bits == f.value_bits == bits))
        coder.fit(0, sample)
        decoded = coder.code(0, sample.key, sample.value, Run())
        errors.append(((decoded.key - sample.key).norm() / sample.key.norm()).item())
        assert decoded.value.shape == sample.value.shape
    assert errors[0] < 0.005
    assert errors == sorted(errors)


def test_bits_are_those_of_the_page():
    for fmt in all_formats():
        bits = Ours(fmt).bits(Shape(layers=3, kv_heads=2, head_dim=64), 4096)
        assert bits == PageLayout(fmt, 64, 16).bytes_per_token * 8 / 128


def test_scales_balance_the_keys():
    sample = random_sample(windows=6)
    scales = sample.scales
    residual = sample.key[:, 1:] - batched.centres(scales, sample.key.shape[1])[1:]
    even = torch.einsum("hcd,wthd->wthc", scales.key_transform, residual)
    spread = even.flatten(0, 1).std(0)
    assert spread.amax() / spread.amin() < 1.6
    assert spread.mean() == pytest.approx(1, abs=0.15)
