"""The CUDA decode kernel against attention in float64, on fresh random pages each run."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kv_cache.cuda.runtime.device import device_limits
from kv_cache.cuda.tuning import Tuning
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS
from tests.kv_cache.cuda.random_batch import MIXED, Batch, relative_error, served

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_numbers"),
]

NAMES = (*FORMATS, *MIXED)
# Rounding to bfloat16 alone makes 1.6e-3, to float16 2e-4; queries and weights in float16 add 1e-4 to 4e-4.
# bfloat16's rounding alone comes to 1.7e-3, and to more where few numbers make up most of an output's norm.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 8e-4}


def check(batch: Batch, factor: float = 1.0) -> None:
    """Check a batch, and the same without its tokens' own keys and values."""
    if batch.own is not None:
        check(replace(batch, own=None), factor)
    got, want = batch.run(), batch.want()
    at = 0
    for request, (length, count) in enumerate(zip(batch.lens, batch.query_lens, strict=True)):
        rows = slice(at, at + count)
        at += count
        if length and count:
            error = relative_error(got[rows], want[rows])
            print(f"request {request} of {length}: {error:.2e}")
            assert error < TOLERANCE[batch.query.dtype] * factor, (request, length, count)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "dim"), served(NAMES))
def test_formats_and_head_sizes(name, dim, dtype):
    lens = [1, 15, 16, 17, 33, 4099, random.randint(1, 3000), random.randint(1, 500)]
    check(Batch.make(name, lens, [1] * len(lens), dim=dim, dtype=dtype))


@pytest.mark.parametrize(("name", "dim"), served(NAMES))
def test_pages_that_the_codec_wrote(name, dim):
    lens = [1, 17, random.randint(2, 600)]
    check(Batch.make(name, lens, [1] * 3, dim=dim, dtype=torch.float16, written=True))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("query_len", [1, 2, 5, 16])
def test_rows(group, query_len):
    lens = [random.randint(query_len, 900) for _ in range(6)]
    queries = [random.randint(1, query_len) for _ in range(5)] + [query_len]
    check(Batch.make("int4_per_head", lens, queries, group=group, dtype=torch.float16))


@pytest.mark.parametrize("query_len", [4, 16])
@pytest.mark.parametrize(("name", "dim"), served(NAMES, (64, 80, 128, 256)))
def test_many_rows_of_every_format(name, dim, query_len):
    lens = [random.randint(query_len, 1200) for _ in range(3)] + [query_len]
    check(Batch.make(name, lens, [query_len] * 4, dim=dim, dtype=torch.float16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [16, 32, 64, 272])
def test_block_sizes_and_padded_pages(name, block):
    lens = [random.randint(1, 2500) for _ in range(5)]
    check(Batch.make(name, lens, [1] * 5, block=block, padded=True, dtype=torch.float16))


@pytest.mark.parametrize("window", [1, 16, 100, 1024])
@pytest.mark.parametrize("query_len", [1, 3])
def test_window(window, query_len):
    # Some windows reach back to token 0, whose centre is another, and some do not.
    lens = [random.randint(query_len, 3000) for _ in range(5)] + [max(window, query_len)]
    check(Batch.make("int4_per_head", lens, [query_len] * 6, window=window, dtype=torch.float16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("soft_cap", [5.0, 50.0])
def test_soft_cap(name, soft_cap):
    lens = [random.randint(2, 3000) for _ in range(4)]
    check(Batch.make(name, lens, [2] * 4, soft_cap=soft_cap, sharpness=2.0, dtype=torch.float16), factor=2.0)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_a_soft_cap_and_a_window(dim):
    lens = [random.randint(2, 5000) for _ in range(6)]
    check(
        Batch.make(
            "int4_per_head", lens, [2] * 6, dim=dim, soft_cap=20.0, window=700, sharpness=2.0, dtype=torch.float16
        ),
        2.0,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("more", [{}, {"window": 128}, {"soft_cap": 20.0}], ids=str)
@pytest.mark.parametrize(("name", "dim"), served(NAMES, (64, 96, 128, 256)))
def test_sinks(name, dim, more, dtype):
    lens = [random.randint(3, 5000) for _ in range(6)] + [20000]
    check(Batch.make(name, lens, [3] * 7, dim=dim, group=8, sinks=True, dtype=dtype, **more), factor=2.0)


@pytest.mark.parametrize("name", NAMES)
def test_sharp_attention(name):
    # Logits with a deviation of tens: few tokens share the weight, and the query's rounding to float16 shows most.
    # Where two of them weigh about the same, it alone makes up to 4e-3.
    lens = [random.randint(500, 6000) for _ in range(6)]
    check(Batch.make(name, lens, [1] * 6, sharpness=8.0, dtype=torch.float16), factor=10.0)


@pytest.mark.parametrize(
    "choice",
    [
        {"bulk_copy": False},
        {"bulk_copy": False, "units": 1, "stages": 3},
        {"warps": 4, "blocks_per_sm": 2},
        {"units": 1, "stages": 4},
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_other_tunings(name, choice):
    # Without bulk copies, this is the kernel of devices before Hopper.
    lens = [random.randint(1, 5000) for _ in range(40)]
    batch = Batch.make(name, lens, [1] * 40, block=32, dtype=torch.float16)
    tuning = replace(Tuning(1), **choice)
    _, shared, _ = device_limits(batch.query.device)
    if tuning.shared_bytes(batch.layout) > shared:
        tuning = replace(tuning, shared_table=False)
    got = batch.run(batch.attention(tuning))
    assert relative_error(got, batch.want()) < TOLERANCE[torch.float16]


def test_mixed_lengths_and_padding_requests():
    lens = [20000, 0, 3, 0, 700, 1, 9000, 0, *[random.randint(1, 100) for _ in range(60)], 0]
    check(Batch.make("int4_per_head", lens, [1 if length else 0 for length in lens], dtype=torch.float16))


@pytest.mark.parametrize("name", ["int4_per_head", "int3_per_head"])
def test_long_context(name):
    check(Batch.make(name, [131072, 70001], [1, 1], kv_heads=1, dtype=torch.float16), factor=2.0)


def test_large_batch():
    lens = [random.randint(1, 300) for _ in range(600)]
    check(Batch.make("int8_per_head", lens, [1] * 600, kv_heads=8, dtype=torch.float16))


def test_graph_replays_with_other_lengths():
    batch = Batch.make("int4_per_head", [3000, 40, 1700], [1, 1, 1], dtype=torch.float16)
    attention, out = batch.attention(), torch.empty_like(batch.query)
    lens, start = batch.indices()

    def call():
        pages = batch.cache, batch.table, lens, start
        attention(batch.query, out, *pages, batch.folding, batch.scale, own=batch.own)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for now in ([3000, 40, 1700], [2999, 1, 16], [17, 33, 0], [1, 40, 1700]):
        lens.copy_(torch.tensor(now, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        batch.lens = now
        want, seen = batch.want(), [i for i, length in enumerate(now) if length]
        assert relative_error(out[seen], want[seen]) < TOLERANCE[torch.float16]
        assert out[[i for i in range(3) if i not in seen]].isnan().all()


def test_repeats_give_the_same_bits():
    # Which thread block merges last varies; what it computes must not.
    batch = Batch.make("int4_per_head", [5000, 123, 8000], [1, 1, 1])
    attention = batch.attention()
    first = batch.run(attention)
    assert all(torch.equal(first, batch.run(attention)) for _ in range(20))


def test_refusals():
    batch = Batch.make("int4_per_head", [5], [1])
    attention = batch.attention()
    batch.query = batch.query.half()
    with pytest.raises(ParetoError, match="bfloat16"):
        batch.run(attention)
