"""Decode attention's own CUDA source, run on a CPU (emulator/), against attention in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kv_cache import reference
from kv_cache.cuda import decode
from kv_cache.errors import ParetoError
from tests.kv_cache.cuda.emulator import emulated
from tests.kv_cache.cuda.random_batch import MIXED, Batch, relative_error
from tests.kv_cache.cuda.test_decode import NAMES, check

__all__ = ["emulated"]
pytestmark = pytest.mark.usefixtures("emulated", "fresh_numbers")

HALF = {"dtype": torch.float16, "device": "cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_formats(name):
    """Several pieces of a sequence, one that is a page and a token, a padding request, and a single token."""
    check(Batch.make(name, [1, 33, 700, 0, 17], [1, 1, 1, 0, 1], **HALF))


@pytest.mark.parametrize(
    ("name", "dim"),
    [("int3_per_head", 64), ("k8v2", 64), ("int3_per_head", 96), ("k6v8", 96), ("k3v6", 256), ("k2v4", 256)]
    + [(name, 80) for name in ("int8_per_head", "int6_per_head", "k2v4", "k8v2")],
)
def test_head_sizes(name, dim):
    check(Batch.make(name, [40, 300], [1, 1], dim=dim, **HALF))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("int4_per_head", {"window": 100, "query_lens": [3, 1, 2]}),  # The first token is out of sight, and in it.
        ("int4_per_head", {"soft_cap": 30.0, "query_lens": [1, 1, 1], "group": 1, "dim": 80}),
        ("int4_per_head", {"query_lens": [1, 2, 1], "block": 48, "padded": True, "dim": 256}),
        ("int4_per_head", {"query_lens": [1, 5, 1], "group": 7, "dim": 96, "dtype": torch.bfloat16}),
        ("int3_per_head", {"window": 17, "soft_cap": 20.0, "query_lens": [1, 16, 5], "group": 2}),
        ("k4v3_per_head", {"query_lens": [1, 8, 1], "group": 4, "block": 32, "padded": True}),
        ("int6_per_head", {"query_lens": [2, 1, 1], "block": 272, "dim": 64, "sharpness": 4.0}),
    ],
)
def test_shapes(name, settings):
    check(Batch.make(name, **{"lens": [400, 17, 65], **HALF, **settings}), 2.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("int4_per_head", {}),
        ("int4_per_head", {"dtype": torch.bfloat16, "dim": 64, "group": 8, "window": 100}),  # gpt-oss' shape.
        ("int3_per_head", {"window": 17, "soft_cap": 20.0, "query_lens": [1, 16, 5], "group": 2}),
        ("k4v3_per_head", {"query_lens": [1, 8, 1], "group": 7, "dim": 96}),
        ("int8_per_head", {"group": 3, "dim": 80, "soft_cap": 30.0}),
        ("int6_per_head", {"group": 2, "dim": 256}),
    ],
)
def test_sinks(name, settings):
    # 1,200 tokens are several pieces, each merged once: a sink that joined each of them would count twice.
    batch = Batch.make(name, **{"lens": [1200, 17, 65], "query_lens": [1, 1, 1], "sinks": True, **HALF, **settings})
    check(batch, 2.0)
    without = replace(batch, sinks=None)
    assert relative_error(without.run()[:, 0], batch.want()[:, 0]) < 1e-2  # A sink of -infinity is none.
    if "sharpness" not in settings:  # Sharp logits may be above any sink.
        assert relative_error(without.run(), batch.want()) > 0.1


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(8).half(), torch.zeros(16)[::2]])
def test_other_sinks_are_refused(sinks):
    batch = Batch.make("int4_per_head", [5], [1], **HALF)
    batch.sinks = sinks
    with pytest.raises(ParetoError, match=r"float32 sinks \[8\]"):
        batch.run()


@pytest.mark.parametrize("byte", [0, 255])
def test_values_of_extreme_scales(byte):
    """A softmax weight times a value's scale has to fit into float16."""
    batch = Batch.make("int4_per_head", [300], [1], sharpness=4.0, **HALF)
    meta = batch.cache.flatten(2)[..., batch.layout.offsets["meta"] :].unflatten(-1, (-1, 4))
    meta[..., 2] = byte
    check(batch, 4.0)


@pytest.mark.parametrize("name", ["int4_per_head", "int3_per_head", "k6v8"])
def test_as_ampere_copies(name, monkeypatch):
    monkeypatch.setattr(decode, "cuda_device", lambda layout, device: (device, (8, 0)))
    batch = Batch.make(name, [300, 18], [1, 2], block=32, **HALF)
    assert not batch.attention().tuning.bulk_copy
    check(batch)


@pytest.mark.parametrize("name", ["int4_per_head", "k4v3_per_head", *MIXED])
@pytest.mark.parametrize("dim", [96, 128])
def test_pages_that_the_codec_wrote(name, dim):
    """Against the specification itself, which reads one page after the other."""
    more = {"window": 60, "sinks": dim == 128}
    batch = Batch.make(name, [70, 1, 20], [2, 1, 0], kv_heads=1, dim=dim, written=True, **more, **HALF)
    lens, start = batch.indices()
    want = reference.paged_attention(
        batch.query,
        batch.cache,
        batch.table,
        lens,
        start,
        batch.layout,
        batch.scales,
        batch.scale,
        batch.window,
        own=batch.own,
        sinks=batch.sinks,
    )
    assert relative_error(batch.want(), want) < 1e-12
    assert relative_error(batch.run(), want) < 8e-4
