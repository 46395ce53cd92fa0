"""A random layer of a random model, for tests of coders."""

import torch

from kv_cache.rotary import Rotary
from kv_cache.simulate.coder import Sample
from tests.kv_cache.random_scales import MAX_POSITION


def random_sample(windows=3, tokens=300, kv_heads=2, dim=64, queries=40, heads_each=2) -> Sample:
    """Keys with a mean that rotary embedding turns and with channels of uneven size, values of uneven tokens."""
    rotary = Rotary.over(dim, 10000.0 ** (-torch.arange(0, dim, 2) / dim), MAX_POSITION)
    spread = torch.rand(kv_heads, dim) * 3 + 0.1
    base = torch.randn(windows, tokens, kv_heads, dim) * spread + torch.randn(kv_heads, dim) * 4
    base[:, 0] += 20
    key = rotary.turn(base, torch.arange(tokens))
    positions = torch.randperm(tokens)[:queries].sort().values
    output = torch.randn(kv_heads, 2 * dim, dim)
    return Sample(
        query=torch.randn(windows, queries, kv_heads * heads_each, dim),
        query_positions=positions,
        key=key,
        value=torch.randn(windows, tokens, kv_heads, dim) * (0.1 + torch.rand(windows, tokens, 1, 1) * 5),
        first_key=key[:, 0],
        scaling=dim**-0.5,
        rotary=rotary,
        value_metric=output.mT @ output,
    )
