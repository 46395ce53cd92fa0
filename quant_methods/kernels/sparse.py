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
    if x.shape[0] <= FEW_TOKENS:
        products = x.index_select(1, columns).float() * values.float()
        sums = torch.zeros((x.shape[0], out), dtype=torch.float32, device=x.device)
        return sums.index_add_(1, _rows(starts, len(values)), products).to(x.dtype)
    result = x.new_empty((x.shape[0], out))
    for start in range(0, out, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, out - start)
        dense = x.new_zeros(count, x.shape[1])
        add_sparse(dense, start, starts, columns, values)
        result[:, start : start + count] = functional.linear(x, dense)
    return result


def add_sparse(weight: Tensor, first: int, starts: Tensor, columns: Tensor, values: Tensor) -> None:
    """Add those of a layer's single weights that lie in some of its rows, in place; no shape depends on their places.

    Args:
        weight: [rows, in], contiguous.
        first: the output channel that its first row is of.
        starts: int32 [out + 1], where each output channel's weights begin.
        columns: int32 [n], their input channels.
        values: [n] in ``weight``'s dtype.

    """
    place = (_rows(starts, len(values)) - first) * weight.shape[1] + columns
    inside = (place >= 0) & (place < weight.numel())
    # The others add zeros, all over the matrix: in one place they would wait for each other.
    weight.view(-1).index_add_(0, place.remainder(weight.numel()), values.where(inside, 0))


def _rows(starts: Tensor, count: int) -> Tensor:
    """Return each stored weight's output channel, int64."""
    # Told how many there will be, it need not wait for a GPU's count.
    channels = torch.arange(len(starts) - 1, device=starts.device)
    return torch.repeat_interleave(channels, starts.diff().long(), output_size=count)
