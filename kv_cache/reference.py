"""Paged attention over codes in plain PyTorch: the specification of every attention kernel."""

from __future__ import annotations

import torch

from kv_cache.codec import read_page
from kv_cache.layout import PageLayout
from kv_cache.scales import LayerScales


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    layout: PageLayout,
    scales: LayerScales,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Attend causally over codes; every key and value, a token's own included, is read from its page.

    Args:
        query: [tokens, heads, head_dim], any float dtype; a request's tokens are the last of its sequence.
        cache: uint8 [blocks, KV heads, block_size, bytes per token].
        block_table: int32 [requests, blocks of the longest].
        seq_lens: int32 [requests], the query's tokens included.
        query_start: int32 [requests + 1], where each request's tokens start in ``query``.
        layout: of a page.
        scales: the layer's.
        scale: factor of q.k.
        window: a token sees the last ``window`` tokens, itself included; 0 means all.
        soft_cap: c in ``c * tanh(score / c)``; 0 means none.
        dtype: of the arithmetic.

    Returns:
        [tokens, heads, head_dim] in ``dtype``.

    """
    heads, kv_heads = query.shape[1], cache.shape[1]
    out = torch.zeros(query.shape, dtype=dtype)
    for request, length in enumerate(seq_lens.tolist()):
        start, stop = int(query_start[request]), int(query_start[request + 1])
        if start == stop:
            continue
        blocks = block_table[request, : -(-length // layout.block_size)].tolist()
        position = torch.arange(length - (stop - start), length)
        token = torch.arange(length)
        hidden = token[None] > position[:, None]
        if window:
            hidden |= token[None] <= position[:, None] - window
        for kv_head in range(kv_heads):
            pages = [
                read_page(cache[b, kv_head].reshape(-1), layout, scales, kv_head, index * layout.block_size, dtype)
                for index, b in enumerate(blocks)
            ]
            keys, values = (torch.cat(parts)[:length] for parts in zip(*pages, strict=True))
            group = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
            scores = torch.einsum("qhd,td->hqt", query[start:stop, group].to(dtype), keys) * scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[start:stop, group] = torch.einsum("hqt,td->qhd", weights, values)
    return out
