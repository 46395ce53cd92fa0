"""Causal attention over what a coder read back, and over the newest tokens as they are where it keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.simulate.coder import Decoded

SCORES = 2**28
"""Numbers of attention scores in memory at once."""


def attend(query: Tensor, key: Tensor, value: Tensor, decoded: Decoded, scaling: float) -> Tensor:
    """Attend causally.

    Args:
        query: float32 [windows, tokens, heads, head_dim].
        key: float32 [windows, tokens, KV heads, head_dim], as they were.
        value: as they were.
        decoded: what is read back of them.
        scaling: what ``q . k`` is multiplied by.

    Returns:
        float32 of the query's shape.

    """
    if decoded.coded_keys is None and decoded.coded_values is None:
        heads = query.shape[2] // key.shape[2]
        parts = (query, decoded.key.repeat_interleave(heads, 2), decoded.value.repeat_interleave(heads, 2))
        q, k, v = (part.transpose(1, 2) for part in parts)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return out.transpose(1, 2)
    position = torch.arange(key.shape[1], device=key.device)
    if all(coded is not None and torch.equal(coded, position) for coded in (decoded.coded_keys, decoded.coded_values)):
        return _attend_past(query, key, value, decoded, scaling)
    return _attend_partly(query, key, value, decoded, scaling)


def _attend_past(query: Tensor, key: Tensor, value: Tensor, decoded: Decoded, scaling: float) -> Tensor:
    """Attend where a token's own key and value alone are as they were: half the products that masks would take."""
    windows, tokens, heads, _ = query.shape
    grouped = query.unflatten(2, (key.shape[2], -1)) * scaling
    own = torch.einsum("wtgrd,wtgd->wgrt", grouped, key)
    difference = value - decoded.value
    parts = []
    for rows in torch.arange(tokens, device=query.device).split(max(1, SCORES // (windows * heads * tokens))):
        seen, at = slice(0, int(rows[-1]) + 1), torch.arange(len(rows), device=rows.device)
        scores = torch.einsum("wtgrd,wsgd->wgrts", grouped[:, rows], decoded.key[:, seen])
        scores[..., at, rows] = own[..., rows]
        weights = scores.masked_fill_(torch.arange(seen.stop, device=rows.device) > rows[:, None], float("-inf"))
        weights = weights.softmax(-1)
        out = torch.einsum("wgrts,wsgd->wtgrd", weights, decoded.value[:, seen])
        out += torch.einsum("wgrt,wtgd->wtgrd", weights[..., at, rows], difference[:, rows])
        parts.append(out.flatten(2, 3))
    return torch.cat(parts, 1)


def _attend_partly(query: Tensor, key: Tensor, value: Tensor, decoded: Decoded, scaling: float) -> Tensor:
    """Attend some queries at a time, with the scores and weights of decoded and of exact tokens told apart by masks."""
    windows, tokens, heads, _ = query.shape
    position = torch.arange(tokens, device=query.device)
    everything = position + 1
    coded_keys = everything if decoded.coded_keys is None else decoded.coded_keys
    coded_values = everything if decoded.coded_values is None else decoded.coded_values
    grouped = query.unflatten(2, (key.shape[2], -1))
    parts = []
    for rows in position.split(max(1, SCORES // (windows * heads * tokens))):
        seen = slice(0, int(rows[-1]) + 1)
        q = grouped[:, rows] * scaling
        read = torch.einsum("wtgrd,wsgd->wgrts", q, decoded.key[:, seen])
        kept = torch.einsum("wtgrd,wsgd->wgrts", q, key[:, seen])
        scores = torch.where(position[seen] < coded_keys[rows, None], read, kept)
        weights = scores.masked_fill_(position[seen] > rows[:, None], float("-inf")).softmax(-1)
        from_codes = position[seen] < coded_values[rows, None]
        out = torch.einsum("wgrts,wsgd->wtgrd", weights * from_codes, decoded.value[:, seen])
        out += torch.einsum("wgrts,wsgd->wtgrd", weights * ~from_codes, value[:, seen])
        parts.append(out.flatten(2, 3))
    return torch.cat(parts, 1)
