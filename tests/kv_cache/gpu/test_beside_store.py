"""Queries prepared while the newest tokens are still being stored, against one launch after the other."""

from __future__ import annotations

import pytest
import torch

from kv_cache.gpu.folding import PositionTables
from kv_cache.gpu.sides import make_side
from kv_cache.gpu.store import store
from tests.kv_cache.gpu.random_batch import Batch
from tests.kv_cache.random_scales import MAX_POSITION, random_scales

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["int4_per_head+centred", "k8v4_per_head+feedback", "int8_per_head", "int6_per_head"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("lens", [[5], [700, 3, 4100, 64], [2048] * 8])
def test_beside_the_store(name, dim, query_len, lens):
    kv_heads, queries = 2, [min(query_len, length) for length in lens]
    scales = random_scales(name, kv_heads, dim)
    batch = Batch.make(name.partition("+")[0], lens, queries, dim=dim, kv_heads=kv_heads, scales=scales)
    attention, layout = batch.attention(), batch.layout
    tables = PositionTables.of(batch.centres, dim, DEVICE) if batch.centres else None
    sides = tuple(make_side(kind, layout, kv_heads, scales, DEVICE, MAX_POSITION) for kind in ("key", "value"))
    seq_lens, start = batch.indices()
    positions = torch.cat([torch.arange(n - q, n) for n, q in zip(lens, queries, strict=True)])
    requests = torch.arange(len(lens)).repeat_interleave(torch.tensor(queries))
    blocks = batch.table.cpu().long()[requests, positions // layout.block_size]
    slots = (blocks * layout.block_size + positions % layout.block_size).cuda()
    tokens, positions = len(slots), positions.cuda()
    pages = batch.cache.as_strided((batch.cache.untyped_storage().nbytes(),), (1,))
    before = pages.clone()

    key, value = (torch.empty(tokens, kv_heads, dim, device=DEVICE, dtype=batch.query.dtype) for _ in range(2))
    query, out = torch.empty_like(batch.query), torch.empty_like(batch.query)

    def step(beside: bool) -> None:
        may = store(layout, sides, batch.cache, key, value, slots, positions)
        assert not may or dim <= 128 or "+" not in name
        attention.prepare(query, batch.folding, batch.scale, tables, beside and may)
        attention.attend(out, batch.cache, batch.table, seq_lens, start, batch.folding, positions=tables)

    graphs = {}
    for beside in (False, True):
        step(beside)
        torch.cuda.synchronize()
        graphs[beside] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[beside]):
            for _ in range(3):
                step(beside)
    for _ in range(20):
        key.normal_(), value.normal_(), query.normal_()
        results = {}
        for beside, graph in graphs.items():
            pages.copy_(before)
            out.fill_(float("nan"))
            graph.replay()
            results[beside] = out.clone(), pages.clone()
        assert torch.equal(results[False][0], results[True][0])
        assert torch.equal(results[False][1], results[True][1])
