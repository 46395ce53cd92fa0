"""Products with a layer's sparse part, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FEW_TOKENS = 32
"""Up to so many tokens each stored weight is multiplied on its own; more are worth a dense product."""

ROWS_AT_ONCE = 1024
"""Output channels made dense at a time."""


def sparse_linear(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return the product of inputs with a sparse weight in compressed rows.

    Args:
        x: [tokens, in].
        starts: int32 [out + 1], where each output channel's weights begin.
        columns: int32 [n], their input channels.
        values: [n] in ``x``'s dtype.

    Returns:
        [tokens, out] in ``x``'s dtype; sums are taken in float32.

    """
    out = len(starts) - 1
    # Told how many there will be, it need not wait for a GPU's count.
    rows = torch.repeat_interleave(
        torch.arange(out, device=x.device), starts.diff().long(), output_size=values.shape[0]
    )
    if x.shape[0] <= FEW_TOKENS:
        products = x.index_select(1, columns).float() * values.float()
        sums = torch.zeros((x.shape[0], out), dtype=torch.float32, device=x.device)
        return sums.index_add_(1, rows, products).to(x.dtype)
    # One weight more, at the end, takes what lies in other rows, so that no shape depends on values.
    result = x.new_empty((x.shape[0], out))
    for start in range(0, out, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, out - start)
        dense = x.new_zeros(count * x.shape[1] + 1)
        place = (rows - start) * x.shape[1] + columns
        inside = (rows >= start) & (rows < start + count)
        dense.index_copy_(0, torch.where(inside, place, dense.shape[0] - 1), values)
        result[:, start : start + count] = functional.linear(x, dense[:-1].view(count, x.shape[1]))
    return result
