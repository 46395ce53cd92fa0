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
    own: tuple[torch.Tensor, torch.Tensor] | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally over codes; a token's own key and value are as they were before they were coded, if given.

    WKVQuant (Yue et al. 2024, section 3.2) calls it past-only quantization: a token sees itself in full precision, and
    that costs no memory, as its key and value have just been computed.

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
        own: keys, after rotary embedding, and values of the query's tokens, each [tokens, KV heads, head_dim]; None:
            they too are read from their pages.
        sinks: float32 [heads], a logit of each head that joins the sum in the softmax and brings no value, so that
            weights add up to less than 1 (gpt-oss; Miller 2023, "Attention is off by one", fixes it at 0). It is of
            the size of scaled logits, and no soft cap applies to it. None: there is none.

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
            row, at = torch.arange(stop - start), position
            if own is not None:
                own_key, own_value = (x[start:stop, kv_head].to(dtype) for x in own)
                scores[:, row, at] = torch.einsum("qhd,qd->hq", query[start:stop, group].to(dtype), own_key) * scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            scores = scores.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                sink = sinks[group].to(dtype)[:, None, None].expand(*scores.shape[:2], 1)
                scores = torch.cat([scores, sink], -1)
            weights = scores.softmax(-1)[..., :length]
            out[start:stop, group] = torch.einsum("hqt,td->qhd", weights, values)
            if own is not None:
                out[start:stop, group] += torch.einsum("hq,qd->qhd", weights[:, row, at], own_value - values[at])
    return out
