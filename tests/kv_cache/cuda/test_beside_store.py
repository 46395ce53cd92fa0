"""Queries prepared while the newest tokens are still being stored, against one launch after the other."""

from __future__ import annotations

import pytest
import torch

from kv_cache.cuda import store as stores
from kv_cache.cuda.constants import LayerConstants
from tests.kv_cache.cuda.random_batch import Batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class DecodeStep:
    """A step of a layer over pages that hold all tokens but the newest.

    With ``whole``, all tokens are stored in the step, by another request whose pages this one's are too. A thousand
    tokens or so leave room on the multiprocessors for the kernels that must wait; beside many more nothing runs.
    """

    def __init__(self, name, dim, query_len, lens, device, kv_heads=2, whole=False):
        queries = [min(query_len, length) for length in lens]
        # What a step before this one stored would hide that pages are read too early, where all tokens are stored.
        self.steps = 1 if whole else 3
        self.batch = batch = Batch.make(name, lens, queries, dim=dim, kv_heads=kv_heads, device=device)
        self.attention, layout = batch.attention(), batch.layout
        self.layer = LayerConstants.of(layout, batch.scales, device)
        self.seq_lens, self.start = batch.indices()
        stored = lens if whole else queries
        positions = torch.cat([torch.arange(n - s, n) for n, s in zip(lens, stored, strict=True)])
        requests = torch.arange(len(lens)).repeat_interleave(torch.tensor(stored))
        self.few = -(-len(positions) // stores.TOKENS) * kv_heads <= stores.device_limits(device)[0]
        self.awaits_store = torch.full((1,), int(whole), dtype=torch.int32, device=device)
        blocks = batch.table.cpu().long()[requests, positions // layout.block_size]
        self.slots = (blocks * layout.block_size + positions % layout.block_size).to(device)
        self.positions = positions.to(device)
        self.pages = batch.cache.as_strided((batch.cache.untyped_storage().nbytes(),), (1,))
        self.before = self.pages.clone()
        shape = len(positions), kv_heads, dim
        self.key, self.value = (torch.empty(shape, device=device, dtype=batch.query.dtype) for _ in range(2))
        self.query, self.out = torch.empty_like(batch.query), torch.empty_like(batch.query)

    def renew(self):
        for fresh in (self.key, self.value, self.query):
            fresh.normal_()

    def reset(self):
        self.pages.copy_(self.before)
        self.out.fill_(float("nan"))

    def run(self, beside):
        """Return whether the launches ran beside each other."""
        batch = self.batch
        may = stores.store(self.layer, batch.cache, self.key, self.value, self.slots, self.positions)
        self.attention.prepare(self.query, batch.folding, batch.scale, beside and may, awaits_store=self.awaits_store)
        self.attention.attend(self.out, batch.cache, batch.table, self.seq_lens, self.start, batch.folding)
        return beside and may

    def result(self):
        return self.out.clone(), self.pages.clone()


@pytest.mark.parametrize("name", ["int4_per_head", "k4v3_per_head", "int8_per_head"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("lens", [[5], [700, 3, 4100, 64], [2048] * 8])
def test_beside_the_store(name, dim, query_len, lens):
    compare(DecodeStep(name, dim, query_len, lens, torch.device("cuda", 0)))


@pytest.mark.parametrize("name", ["int4_per_head", "int3_per_head"])
@pytest.mark.parametrize("lens", [[1025], [300, 500, 17], [4097], [300, 20000, 17]])
def test_pages_that_the_same_step_stores_for_another_request(name, lens):
    compare(DecodeStep(name, 128, 1, lens, torch.device("cuda", 0), whole=True))


def compare(step):
    """Check that launches beside each other leave what launches one after the other do."""
    overlaps, graphs = torch.cuda.get_device_capability() >= (9, 0), {}
    for beside in (False, True):
        assert step.run(beside) == (beside and overlaps and step.few)
        torch.cuda.synchronize()
        graphs[beside] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[beside]):
            for _ in range(step.steps):
                step.run(beside)
    for _ in range(20):
        step.renew()
        results = {}
        for beside, graph in graphs.items():
            step.reset()
            graph.replay()
            results[beside] = step.result()
        for one, other in zip(results[False], results[True], strict=True):
            assert torch.equal(one, other)
