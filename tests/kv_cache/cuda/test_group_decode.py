"""The Triton kernel for scales inside the page against the specification, on fresh random inputs each run.

Where there is no CUDA device the tests run in Triton's interpreter, on the CPU. Triton chooses its interpreter when it
is imported, so they do so in a process of their own.
"""

from __future__ import annotations

import itertools
import os
import random
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from kv_cache import reference
from kv_cache.codec import write_pages
from kv_cache.errors import ParetoError
from kv_cache.formats import HEAD_SIZES, get_format
from kv_cache.layout import PageLayout
from tests.kv_cache.empty_pages import empty_pages
from tests.kv_cache.cuda.random_batch import relative_error
from tests.triton_interpreter import run_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
GROUP_FORMATS = ("int8_per_group", "int4_per_group")
# Keys, values and weights are rounded to the query's dtype, and so is the output: 2e-4 each in float16, 1.6e-3 in
# bfloat16.
TOLERANCE = {torch.float16: 8e-4, torch.bfloat16: 5e-3}


def on_device(test):
    where = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device")
    return pytest.mark.gpu(where(test))


@pytest.fixture(autouse=True)
def seed():
    value = random.SystemRandom().randrange(2**31)
    random.seed(value)
    torch.manual_seed(value)
    print(f"seed {value}")


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    """The interpreter keeps bfloat16 as integers: it multiplies those, and cuts bits off where a device rounds."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    create_dot, convert = InterpreterBuilder.create_dot, interpreter._convert_float

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    def rounded(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy()

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_convert_float", rounded)


class Batch:
    """Requests over one layer's pages; whatever no request may read is NaN, or a block that is not there."""

    def __init__(
        self, name, lens, query_lens, *, dim=64, block=16, kv_heads=2, group=2, dtype=torch.float16, padded=False,
        window=0, soft_cap=0.0, sharpness=1.0,
    ):  # fmt: skip
        self.layout, self.window, self.soft_cap = PageLayout(get_format(name), dim, block), window, soft_cap
        self.lens, self.query_lens = lens, query_lens
        counts = [-(-length // block) for length in lens]
        cache = empty_pages(self.layout, sum(counts) + 2, kv_heads, padded)
        table = torch.full((len(lens), max(counts) + 1), 2**30, dtype=torch.int32)
        ids = iter(torch.randperm(sum(counts) + 2).tolist())
        for request, (length, count) in enumerate(zip(lens, counts, strict=True)):
            table[request, :count] = torch.tensor(list(itertools.islice(ids, count)))
            at = torch.arange(length)
            slots = table[request].long()[at // block] * block + at % block
            key, value = torch.randn(2, length, kv_heads, dim).to(dtype)
            write_pages(cache, key, value, slots, self.layout, None)
        start = list(itertools.accumulate(query_lens, initial=0))
        # The last two query tokens are padding.
        self.query = (torch.randn(start[-1] + 2, kv_heads * group, dim) * sharpness).to(dtype)
        self.cache, self.table = cache, table
        self.seq_lens, self.query_start = (torch.tensor(x, dtype=torch.int32) for x in (lens, start))

    def want(self):
        """Outputs in float64, NaN in rows that are not anyone's."""
        empty = self.seq_lens == 0
        table = self.table.masked_fill(empty[:, None], 0)
        tensors = (self.query, self.cache, table, self.seq_lens.clamp_min(1), self.query_start)
        out = reference.paged_attention(*tensors, self.layout, None, self.scale, self.window, self.soft_cap)
        for request in empty.nonzero().flatten().tolist():
            out[self.query_start[request] : self.query_start[request + 1]] = float("nan")
        out[self.query_start[-1] :] = float("nan")
        return out

    @property
    def scale(self):
        return self.layout.head_dim**-0.5

    def attention(self, programs=None):
        from kv_cache.cuda.group_decode import GroupDecodeAttention

        tokens, heads, _ = self.query.shape
        return GroupDecodeAttention(
            self.layout, self.cache.shape[1], heads, self.query.dtype, torch.device(DEVICE), len(self.lens) + 1,
            tokens, max(self.query_lens), bool(self.soft_cap), programs,
        )  # fmt: skip

    def tensors(self):
        """The call's tensors on the device: queries and outputs with strides, blocks beyond a window not there."""
        tokens, heads, dim = self.query.shape
        query = torch.full((tokens, heads + 1, dim), float("nan"), dtype=self.query.dtype, device=DEVICE)
        query[:, 1:] = self.query
        whole = torch.full((tokens, heads + 2, dim), float("nan"), dtype=self.query.dtype, device=DEVICE)
        cache = self.cache.as_strided((self.cache.untyped_storage().nbytes(),), (1,)).to(DEVICE)
        table = self.table.clone()
        for request, (length, count) in enumerate(zip(self.lens, self.query_lens, strict=True)):
            if self.window:
                table[request, : max(length - count - self.window + 1, 0) // self.layout.block_size] = 2**30
        cache = cache.as_strided(self.cache.shape, self.cache.stride())
        indices = [t.to(DEVICE) for t in (table, self.seq_lens, self.query_start)]
        return whole, (query[:, 1:], whole[:, 1:-1], cache, *indices)

    def run(self, attention=None):
        whole, tensors = self.tensors()
        (attention or self.attention())(*tensors, self.scale, self.window, self.soft_cap)
        assert whole[:, [0, -1]].isnan().all()
        return tensors[1].cpu()


def check_outputs(batch, got, factor=1.0):
    want = batch.want()
    assert torch.equal(got.isnan(), want.isnan())
    for request, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(*batch.query_start[request : request + 2])
        if length and rows.start < rows.stop:
            error = relative_error(got[rows], want[rows])
            print(f"request {request} of {length}: {error:.2e}")
            assert error < TOLERANCE[batch.query.dtype] * factor


def check(batch, programs=None, factor=1.0):
    check_outputs(batch, batch.run(batch.attention(programs)), factor)


@on_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("name", GROUP_FORMATS)
def test_formats_and_head_sizes(name, dim, dtype):
    lens = [random.randint(130, 170), 17, 1, 0]
    check(Batch(name, lens, [1, 2, 1, 0], dim=dim, group=1, dtype=dtype, padded=True), programs=8)


@on_device
@pytest.mark.parametrize(
    ("name", "dim", "kv_heads", "group", "block"),
    [("int8_per_group", 64, 2, 3, 48), ("int4_per_group", 128, 2, 1, 32), ("int8_per_group", 256, 1, 5, 16)],
)
def test_mixed_query_lengths(name, dim, kv_heads, group, block):
    lens = [0, 16, random.randint(150, 300), 5]
    query_lens = [1, 16, 0, random.randint(2, 5)]
    check(Batch(name, lens, query_lens, dim=dim, kv_heads=kv_heads, group=group, block=block), programs=6)


@on_device
@pytest.mark.parametrize("window", [1, 20, 150])
@pytest.mark.parametrize("query_len", [1, 3])
def test_window(window, query_len):
    lens = [random.randint(200, 400), random.randint(query_len, 30)]
    check(Batch("int4_per_group", lens, [query_len] * 2, window=window, kv_heads=1), programs=4)


@on_device
@pytest.mark.parametrize("name", GROUP_FORMATS)
def test_soft_cap(name):
    lens = [random.randint(130, 300), random.randint(2, 30)]
    check(Batch(name, lens, [2] * 2, soft_cap=5.0, sharpness=8.0, kv_heads=1), programs=4, factor=2.0)


@on_device
def test_everything_at_once():
    lens = [random.randint(16, 500) for _ in range(2)]
    more = {"dim": 80, "block": 48, "window": 130, "soft_cap": 20.0, "group": 5, "kv_heads": 1, "padded": True}
    check(Batch("int4_per_group", lens, [9, 2], dtype=torch.bfloat16, **more), programs=9)


@on_device
@pytest.mark.parametrize("programs", [1, 5, 30])
def test_splits(programs):
    lens = [900, 0, 129, 128, random.randint(200, 600)]
    check(Batch("int8_per_group", lens, [1, 0, 2, 1, 1], kv_heads=1, group=1), programs=programs)


@on_device
def test_more_requests_than_the_search_takes_at_once():
    lens = [random.choice([0, 0, 0, 1, 20]) for _ in range(130)] + [200]
    check(Batch("int4_per_group", lens, [min(length, 1) for length in lens], kv_heads=1, group=1), programs=3)


@on_device
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_graph_replays_with_other_lengths():
    batch = Batch("int4_per_group", [3000, 40, 1700], [1, 1, 1], dim=128)
    attention = batch.attention()
    _, tensors = batch.tensors()
    out, seq_lens = tensors[1], tensors[4]
    attention(*tensors, batch.scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(*tensors, batch.scale)
    for now in ([3000, 40, 1700], [2999, 1, 16], [17, 33, 0], [1, 40, 1700]):
        batch.seq_lens = torch.tensor(now, dtype=torch.int32)
        seq_lens.copy_(batch.seq_lens)
        out.fill_(float("nan"))
        graph.replay()
        check_outputs(batch, out.cpu())


@on_device
def test_refusals():
    from kv_cache.cuda.group_decode import GroupDecodeAttention

    batch = Batch("int4_per_group", [5], [1])
    attention = batch.attention(1)
    batch.query = batch.query.bfloat16()
    with pytest.raises(ParetoError, match="float16"):
        batch.run(attention)
    for name, heads, query_len, message in (
        ("int4_per_head", 4, 1, "inside the page"),
        ("int4_per_group", 5, 1, "whole groups"),
        ("int4_per_group", 4, 17, "1 to 16 query tokens"),
    ):
        layout = PageLayout(get_format(name), 64, 16)
        with pytest.raises(ParetoError, match=message):
            GroupDecodeAttention(layout, 2, heads, torch.float16, torch.device(DEVICE), 1, 17, query_len)


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter():
    run_interpreted(__file__)
