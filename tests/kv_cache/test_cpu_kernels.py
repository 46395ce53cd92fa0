"""The compiled kernels against the specification, and the promise that a row's bits depend on nothing but its codes."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from kv_cache import codec, cpu_kernels, reference
from kv_cache.cpu_kernels import ISAS, PagedCache
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, PLANES, layer_format
from kv_cache.layout import PageLayout
from kv_cache.scales import LayerScales
from tests.kv_cache.empty_pages import empty_pages, scattered_table, slots_of
from tests.kv_cache.random_scales import MAX_POSITION, random_scales

try:
    AVAILABLE = ISAS[: ISAS.index(cpu_kernels.best_isa()) + 1]
except ParetoError as missing:  # pragma: no cover
    pytest.skip(str(missing), allow_module_level=True)

# Every dtype, and some layers that mixed_per_head may have.
FMTS = FORMATS | {f"k{k}v{v}": layer_format(k, v) for k, v in ((2, 2), (8, 3), (2, 8), (3, 6))}
SIZES = (64, 80, 96, 128, 256)


def shapes(names):
    """Pairs of format and head size that there are."""
    three = {name for name in names if 3 in (FMTS[name].key_bits, FMTS[name].value_bits)}
    return [(name, dim) for name in names for dim in SIZES if dim % 32 == 0 or name not in three]


# Relative error of the whole output in float32; quantizing queries and weights to 16 bits leaves 5e-5 to 3e-4.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-3, torch.float16: 1.2e-3}


pytestmark = pytest.mark.usefixtures("fresh_numbers")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Batch:
    """Requests over one layer's pages; everything beyond their tokens is poison."""

    layout: PageLayout
    scales: LayerScales
    cache: torch.Tensor
    table: torch.Tensor
    lens: list[int]
    query_lens: list[int]
    query: torch.Tensor
    own: tuple[torch.Tensor, torch.Tensor] | None = None
    window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None

    @property
    def query_start(self) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(self.query_lens)], dtype=torch.int32)

    @property
    def factor(self) -> float:
        return self.layout.head_dim**-0.5

    def run(self, isa: str | None = None) -> torch.Tensor:
        # Rows wider than they need to be, filled with NaN: what is not written, or written elsewhere, shows.
        tokens, heads, dim = self.query.shape
        whole = torch.full((tokens, heads + 2, dim), float("nan"), dtype=self.query.dtype)
        out = whole[:, 1:-1]
        pages = PagedCache(self.cache, self.layout, self.scales)
        lens = torch.tensor(self.lens, dtype=torch.int32)
        pages.attend(
            self.query, out, self.table, lens, self.query_start, self.factor, self.window, self.soft_cap, isa, self.own,
            self.sinks,
        )  # fmt: skip
        assert whole[:, 0].isnan().all()
        assert whole[:, -1].isnan().all()
        return out.clone()

    def want(self) -> torch.Tensor:
        lens = torch.tensor(self.lens, dtype=torch.int32)
        return reference.paged_attention(
            self.query, self.cache, self.table, lens, self.query_start, self.layout, self.scales, self.factor,
            self.window, self.soft_cap, own=self.own, sinks=self.sinks,
        )  # fmt: skip

    def part(self, request: int, first: int, count: int) -> Batch:
        """`count` query tokens of one request from `first` on, as a batch of their own."""
        at = int(self.query_start[request]) + first
        context = self.lens[request] - self.query_lens[request]
        return replace(
            self, table=self.table[request : request + 1], lens=[context + first + count], query_lens=[count],
            query=self.query[at : at + count], own=self.own and tuple(x[at : at + count] for x in self.own),
        )  # fmt: skip


def make(
    name,
    *,
    dim=64,
    block=16,
    kv_heads=2,
    group=2,
    lens=(70,),
    query_lens=(3,),
    dtype=torch.float32,
    padded=False,
    **more,
) -> Batch:
    layout, scales = PageLayout(FMTS.get(name, name), dim, block), random_scales(kv_heads, dim)
    blocks = sum(-(-n // block) for n in lens) + 1
    cache, table = empty_pages(layout, blocks, kv_heads, padded), scattered_table(lens, block, blocks)
    slots = torch.cat([slots_of(row, n, block) for row, n in zip(table, lens, strict=True)])
    # Keys and values are slices of one projection, as vLLM passes them.
    qkv = torch.randn(len(slots), (group + 2) * kv_heads, dim).to(dtype)
    key, value = qkv[:, group * kv_heads : -kv_heads], qkv[:, -kv_heads:]
    value *= 10 ** torch.rand(len(slots), 1, 1)  # tokens' values differ in size
    positions = torch.cat([torch.arange(n) for n in lens])
    PagedCache(cache, layout, scales).store(key, value, slots, positions)
    query = (torch.randn(sum(query_lens), (group + 2) * kv_heads, dim) * 2).to(dtype)[:, : group * kv_heads]
    ends = list(itertools.accumulate(lens))
    newest = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, query_lens, strict=True)])
    # Rows wider than they need to be.
    own = tuple(torch.nn.functional.pad(x[newest], (0, 16))[..., :dim] for x in (key, value))
    return Batch(layout, scales, cache, table, list(lens), list(query_lens), query, own, **more)


def check(batch: Batch, isas=AVAILABLE, sharper: float = 1) -> torch.Tensor:
    """Check a batch, and the same without its tokens' own keys and values.

    Logits that are ``sharper`` times as large have errors as many times as large, and so have weights.
    """
    if batch.own is not None:
        check(replace(batch, own=None), isas, sharper)
    want, outs = batch.want(), [batch.run(isa) for isa in isas]
    for isa, out in zip(isas, outs, strict=True):
        assert not out.isnan().any(), isa
        error = (out.double() - want).norm() / want.norm()
        assert error < TOLERANCE[batch.query.dtype] * sharper, (isa, float(error))
        assert torch.equal(out, outs[0]), f"{isa} differs from {isas[0]}"
    return outs[-1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "dim"), shapes(FMTS))
def test_store_equals_the_codec(name, dim, padded):
    layout, scales = PageLayout(FMTS[name], dim, 16), random_scales(2, dim)
    want = empty_pages(layout, 3, 2, padded)
    key, value = (torch.randn(24, 4, dim)[:, 1:3] * 2 for _ in range(2))
    key[3, 0, 5], key[4, 1, 7], key[9, 0, 1], value[5, 0, 0] = float("nan"), 1e30, float("inf"), float("-inf")
    value[6, 1, -1], value[10, 0, 2:4], value[12, 1, 3] = 7e4, float("inf"), float("nan")
    key[7], value[8] = 0, 1.5
    slots = torch.randperm(48)[:20]
    slots[[2, 11]] = -1
    positions = torch.randint(MAX_POSITION, (20,))
    positions[[1, 4, 17]] = 0
    key[17] = scales.key_first  # nothing is left of it
    codec.write_pages(want, key[:20], value[:20], slots, layout, scales, positions)
    positions[2] = 2**40  # of a token that is not stored
    for isa in AVAILABLE:
        cache = empty_pages(layout, 3, 2, padded)
        PagedCache(cache, layout, scales).store(key, value, slots, positions, isa)  # tokens past the slots are padding
        assert torch.equal(cache, want), isa
        if padded:  # nothing between the pages was touched
            gap = cache.as_strided((48,), (1,), layout.page_bytes)
            assert (gap == 255).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_store_takes_every_dtype(dtype):
    for name in ("int6_per_head", "k4v3_per_head"):
        layout, scales = PageLayout(FMTS[name], 64, 16), random_scales(1, 64)
        cache, want = (empty_pages(layout, 2, 1, False) for _ in range(2))
        key, value = (torch.randn(32, 1, 64).to(dtype) for _ in range(2))
        PagedCache(cache, layout, scales).store(key, value, torch.arange(32), torch.arange(32))
        codec.write_pages(want, key, value, torch.arange(32), layout, scales, torch.arange(32))
        assert torch.equal(cache, want)


def test_store_bits_do_not_depend_on_the_batch():
    layout, scales = PageLayout(FMTS["int3_per_head"], 64, 16), random_scales(2, 64)
    key, value, at = torch.randn(45, 2, 64), torch.randn(45, 2, 64), torch.arange(45)
    whole, parts = (empty_pages(layout, 3, 2, False) for _ in range(2))
    torch.set_num_threads(2)
    PagedCache(whole, layout, scales).store(key, value, at, at + 700)
    for first, stop in itertools.pairwise([0, 1, 3, 19, 45]):
        cut = slice(first, stop)
        PagedCache(parts, layout, scales).store(key[cut], value[cut], at[cut], at[cut] + 700)
    assert torch.equal(whole, parts)


def test_positions_beyond_the_table_are_refused():
    batch = make("int4_per_head", lens=(300,))
    pages = PagedCache(batch.cache, batch.layout, batch.scales, max_tokens=200)
    assert pages.max_tokens == 256
    key, before = torch.randn(1, 2, 64), batch.cache.clone()
    for position in (256, -1):
        with pytest.raises(ParetoError, match="beyond the 256 positions"):
            pages.store(key, key, torch.tensor([0]), torch.tensor([position]))
    with pytest.raises(ParetoError, match="positions of 0 tokens for 1"):
        pages.store(key, key, torch.tensor([0]), torch.tensor([], dtype=torch.int64))
    assert torch.equal(batch.cache, before)
    with pytest.raises(ParetoError, match="beyond the 256 positions"):
        pages.attend(
            batch.query, batch.query, batch.table, torch.tensor([300], dtype=torch.int32), batch.query_start, 1.0
        )


@pytest.mark.parametrize("name", FMTS)
def test_every_format(name):
    check(make(name, block=32, group=4, lens=(1, 67, 300, 583), query_lens=(1, 1, 3, 37), padded=True))


@pytest.mark.parametrize(("name", "dim"), shapes(FMTS))
def test_every_head_size(dim, name):
    check(make(name, dim=dim, lens=(65, 270), query_lens=(9, 1)))


@pytest.mark.parametrize("bits", PLANES)
def test_every_number_of_bits_for_keys_with_every_one_for_values(bits):
    for value_bits in PLANES:
        check(make(layer_format(bits, value_bits), lens=(75, 18), query_lens=(3, 1)))


@pytest.mark.skipif(sys.platform != "linux", reason="guards are set by Linux's mprotect")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("name", "dim"), shapes(FMTS))
def test_nothing_outside_of_the_pages_is_touched(name, dim, at_end):
    """They lie right behind, or right before, memory whose use ends the process."""
    layout, scales = PageLayout(FMTS[name], dim, 16), random_scales(1, dim)
    size, guard = 5 * layout.page_bytes, mmap.PAGESIZE
    room = -(-size // guard) * guard
    memory = torch.frombuffer(mmap.mmap(-1, room + 2 * guard), dtype=torch.uint8)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for place in (0, room + guard):  # no rights
        assert mprotect(ctypes.c_void_p(memory.data_ptr() + place), ctypes.c_size_t(guard), 0) == 0
    start = guard + (room - size if at_end else 0)
    cache = memory[start : start + size].view(5, 1, 16, layout.bytes_per_token)
    pages = PagedCache(cache, layout, scales)
    key, value, query = torch.randn(70, 1, dim), torch.randn(70, 1, dim), torch.randn(1, 2, dim)
    table = torch.tensor([[4, 0, 1, 2, 3] if at_end else [1, 2, 3, 4, 0]], dtype=torch.int32)
    slots = (table[0].long()[:, None] * 16 + torch.arange(16)).view(-1)[:70]
    lens, query_start = torch.tensor([70], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    for isa in AVAILABLE:
        pages.store(key, value, slots, torch.arange(70), isa)
        out = torch.full_like(query, float("nan"))
        pages.attend(query, out, table, lens, query_start, 0.1, isa=isa)
        assert not out.isnan().any()


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("name", ["k4v3_per_head", "int8_per_head"])
def test_every_group(name, group):
    check(make(name, group=group, lens=(33, 140), query_lens=(1, 5)))


@pytest.mark.parametrize("block", [16, 48, 128])
@pytest.mark.parametrize("name", ["int6_per_head", "int4_per_head", "int3_per_head"])
def test_every_block_size(name, block):
    check(make(name, block=block, lens=(block, 3 * block + 5, 1), query_lens=(4, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8_per_head", "int4_per_head"])
def test_every_dtype(name, dtype):
    check(make(name, lens=(130, 19), query_lens=(17, 1), dtype=dtype))


@pytest.mark.parametrize("window", [1, 20, 64, 100, 1000])
@pytest.mark.parametrize("name", ["int4_per_head", "int3_per_head"])
def test_window(name, window):
    check(make(name, group=3, lens=(420, 90), query_lens=(1, 70), window=window))


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("name", ["int8_per_head", "k4v3_per_head"])
def test_soft_cap(name, window):
    batch = make(name, lens=(300, 40), query_lens=(2, 30), soft_cap=3.0, window=window)
    capped = check(batch)
    assert not torch.allclose(capped, replace(batch, soft_cap=0.0).run(), rtol=0.01)


def random_sinks(batch: Batch) -> torch.Tensor:
    """Sinks that take from next to nothing to nearly all of the weight, and one that takes nothing at all."""
    sinks = torch.linspace(-6, 14, batch.query.shape[1])[torch.randperm(batch.query.shape[1])]
    sinks[0] = float("-inf")
    return sinks


@pytest.mark.parametrize("more", [{}, {"window": 50}, {"soft_cap": 3.0}, {"soft_cap": 30.0, "window": 20}], ids=str)
@pytest.mark.parametrize("name", ["int8_per_head", "int4_per_head", "k4v3_per_head"])
def test_sinks(name, more):
    batch = make(name, group=5, lens=(300, 40, 1), query_lens=(2, 30, 1), **more)
    batch.sinks = random_sinks(batch)
    got = check(batch)
    without = replace(batch, sinks=None).run()
    assert torch.equal(got[:, 0], without[:, 0])  # a sink of -infinity is none
    most = int(batch.sinks.argmax())
    assert (got[:, most].norm(dim=-1) < 0.9 * without[:, most].norm(dim=-1)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", SIZES)
def test_sinks_of_every_head_size(dim, dtype):
    batch = make("int4_per_head", dim=dim, group=8, kv_heads=1, lens=(65, 270), query_lens=(9, 1), dtype=dtype)
    batch.sinks = random_sinks(batch)
    check(batch)


def test_a_sink_above_all_logits_leaves_nothing():
    batch = make("int8_per_head", kv_heads=1, group=1)
    for size in (300.0, float("inf")):
        batch.sinks = torch.tensor([size])
        assert (batch.run() == 0).all()


def test_sinks_weigh_what_the_softmax_of_all_logits_says():
    """The specification itself, of one token: its value times the share that its logit has beside the sink."""
    batch = make("int8_per_head", kv_heads=1, group=2, lens=(1,), query_lens=(1,))
    batch.sinks = torch.tensor([1.5, -0.5])
    key, value = (x.double()[0, 0] for x in batch.own)
    share = torch.sigmoid(batch.query[0].double() @ key * batch.factor - batch.sinks)
    torch.testing.assert_close(batch.want()[0], share[:, None] * value)


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(4).double(), torch.zeros(8)[::2], torch.zeros(4, 1)])
def test_other_sinks_are_refused(sinks):
    batch = make("int8_per_head")
    batch.sinks = sinks
    with pytest.raises(ParetoError, match=r"float32 sinks \[4\]"):
        batch.run()


@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_the_first_position_in_and_out_of_the_window(soft_cap):
    """Its key has a centre of its own, and much of a row's weight here."""
    batch = make("int8_per_head", kv_heads=1, lens=(290, 30), query_lens=(6, 30), soft_cap=soft_cap)
    first = batch.scales.key_first
    slot = batch.table[:1, 0].long() * 16
    value = torch.randn(1, 1, 64) * 10
    PagedCache(batch.cache, batch.layout, batch.scales).store(first[None], value, slot, torch.tensor([0]))
    batch.query = batch.query / 4 + first * (12 / batch.factor / first.norm() ** 2)
    seen = [check(replace(batch, window=window)) for window in (0, 290, 288, 284)]
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][:4], seen[2][:4])  # positions 284 to 287 see 288 tokens or less
    for out, rows in ((seen[2], slice(4, 6)), (seen[3], slice(0, 6))):
        assert ((out[rows] - seen[0][rows]).norm(dim=-1) > 0.1 * seen[0][rows].norm(dim=-1)).all()


def test_strong_scores_pick_their_token():
    batch = make("int8_per_head", group=1, kv_heads=1, lens=(600,), query_lens=(1,))
    batch.query = batch.query * 5
    check(batch, sharper=5)


@pytest.mark.parametrize("name", ["int8_per_head", "int4_per_head"])
def test_a_token_of_tiny_values_may_have_all_of_the_weight(name):
    """The weights are rounded beside those of large values, and still sum up to what they are."""
    batch = make(name, group=1, kv_heads=1, lens=(300,), query_lens=(1,))
    key, value = torch.zeros(300, 1, 64), torch.randn(300, 1, 64) * 100
    key[:] = codec.centres(batch.scales, torch.arange(300))
    value[7] *= 1e-5
    key[7] += batch.query[0] / batch.query[0].norm() * 100
    slots = (batch.table[0, :19].long()[:, None] * 16 + torch.arange(16)).view(-1)[:300]
    PagedCache(batch.cache, batch.layout, batch.scales).store(key, value, slots, torch.arange(300))
    out = check(batch)
    assert out.norm() < 0.1 * value[:7].norm()


def test_queries_of_zeros_average_the_values():
    batch = make("int4_per_head", lens=(333,), query_lens=(2,))
    batch.query = torch.zeros_like(batch.query)
    check(batch)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_what_is_not_a_number_stays_with_its_token(isa):
    """Codes of NaN and infinity are codes, and a query that is not finite spoils its own row only."""
    batch = make("int4_per_head", kv_heads=1, lens=(100,), query_lens=(3,))
    layout, scales = batch.layout, batch.scales
    bad = torch.full((2, 1, 64), float("nan"))
    bad[1] = float("inf")
    slots = batch.table[0, :1].long() * 16 + torch.tensor([3, 9])
    PagedCache(batch.cache, layout, scales).store(bad, bad, slots, torch.tensor([3, 9]), isa)
    check(batch, [isa])
    before = batch.run(isa)
    batch.query[1] = float("nan")
    assert torch.equal(batch.run(isa)[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("name", ["int6_per_head", "int4_per_head", "k8v3"])
def test_bits_do_not_depend_on_batching(name, isa):
    batch = make(name, group=3, lens=(700, 5, 66, 300), query_lens=(1, 5, 40, 2))
    whole = batch.run(isa).split(batch.query_lens)
    for request, rows in enumerate(whole):
        assert torch.equal(batch.part(request, 0, len(rows)).run(isa), rows)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("more", [{}, {"window": 90}, {"soft_cap": 20.0}, {"sinks": torch.tensor([2.0, 5.0])}], ids=str)
@pytest.mark.parametrize("name", ["int8_per_head", "k4v3_per_head"])
def test_bits_do_not_depend_on_chunks_of_the_prompt(name, more, isa):
    batch = make(name, group=2, kv_heads=1, lens=(340,), query_lens=(340,), **more)
    whole = batch.run(isa)
    cuts = [0, 1, 4, 63, 64, 129, 256, 257, 339, 340]
    for first, stop in itertools.pairwise(cuts):
        assert torch.equal(batch.part(0, first, stop - first).run(isa), whole[first:stop]), (first, stop)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("name", ["int3_per_head", "int8_per_head"])
def test_bits_do_not_depend_on_threads(name, isa):
    # One request: its chunks are handed out singly and merged. Many: they are whole items.
    for lens, query_lens in (((1500,), (1,)), ((600,), (70,)), ((40, 300, 90, 17, 600, 3), (1, 40, 2, 1, 1, 3))):
        batch = make(name, lens=lens, query_lens=query_lens, window=random.choice([0, 700]))
        batch.sinks = random.choice([None, random_sinks(batch)])
        one = batch.run(isa)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(batch.run(isa), one)
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", FMTS)
def test_bits_do_not_depend_on_what_lies_past_the_end(name):
    batch = make(name, lens=(75, 300), query_lens=(2, 1))
    before = [batch.run(isa) for isa in AVAILABLE]
    used = torch.zeros(batch.cache.shape[0], batch.layout.block_size, dtype=torch.bool)
    for request, length in enumerate(batch.lens):
        for t in range(length):
            used[batch.table[request, t // 16], t % 16] = True
    for page, mask in zip(batch.cache, used, strict=True):
        for plane_name, row in batch.layout.row_bytes.items():
            offset = batch.layout.offsets[plane_name]
            for head in page:
                plane = head.view(-1)[offset : offset + row * 16].view(16, row)
                plane[~mask] = torch.randint(0, 256, (int((~mask).sum()), row), dtype=torch.uint8)
    for isa, out in zip(AVAILABLE, before, strict=True):
        assert torch.equal(batch.run(isa), out)


def test_requests_without_tokens_and_padding_are_left_alone():
    batch = make("int4_per_head", lens=(40, 20, 55), query_lens=(2, 0, 3))
    out = check(batch)
    # Padding as vLLM adds it for fixed shapes: requests of length 0 without queries.
    table = torch.cat([batch.table, torch.full((2, batch.table.shape[1]), -1, dtype=torch.int32)])
    padded = replace(batch, table=table, lens=[*batch.lens, 0, 0], query_lens=[*batch.query_lens, 0, 0])
    assert torch.equal(padded.run(), out)
    none = tuple(x[:0] for x in batch.own)
    empty = replace(batch, table=batch.table[:0], lens=[], query_lens=[], query=batch.query[:0], own=none)
    assert empty.run().shape[0] == 0


@pytest.mark.parametrize("own", [False, True])
def test_rows_depend_on_their_codes(own):
    """The guard of the tests above: one changed code of one seen token changes the output, an unseen one does not."""
    batch = make("int8_per_head", kv_heads=1, lens=(90,), query_lens=(10,))
    if not own:
        batch.own = None
    before = batch.run()
    block, offset = int(batch.table[0, 85 // 16]), 85 % 16
    batch.cache[block, 0].view(-1)[batch.layout.offsets["value.0"] + offset * 64 + 3] ^= 128
    after = batch.run()
    # The row of the token itself does not read its codes if it is given what they were made of.
    unseen = 5 + own
    assert torch.equal(after[:unseen], before[:unseen])
    assert (after[unseen:] != before[unseen:]).any(0).all()  # a mixed channel is in every channel


def test_unknown_instruction_set_is_refused(monkeypatch):
    batch = make("int4_per_head")
    monkeypatch.setenv(cpu_kernels.ISA_VARIABLE, "sse9")
    with pytest.raises(ParetoError, match="sse9"):
        batch.run()
    monkeypatch.setenv(cpu_kernels.ISA_VARIABLE, "generic")
    assert torch.equal(batch.run(), batch.run("generic"))


def test_wrong_pages_are_refused():
    layout, scales = PageLayout(FMTS["int4_per_head"], 64, 16), random_scales(2, 64)
    pages = empty_pages(layout, 2, 2, False)
    with pytest.raises(ParetoError, match="bytes"):
        PagedCache(pages[..., 1:], layout, scales)
    with pytest.raises(ParetoError, match=r"scales are for \(heads, channels\) \(2, 64\), not for \(1, 64\)"):
        PagedCache(pages[:, :1], layout, scales)
