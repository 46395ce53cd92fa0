"""Products with symmetric matrices, of which PyTorch knows none: taken in strips, so that half is never computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _strips(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of eight strips of rows, or of fewer where so narrow ones would be no quicker."""
    size = len(matrix)
    width = max(-(-size // 8), 512 if matrix.is_cuda else 128)
    for start in range(0, size, width):
        yield start, min(start + width, size)


def add_square(total: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to the upper triangle of a matrix, and to some of the rest; ``mirror`` comes after the last.

    Args:
        total: float32 [n, n].
        x: float32 [tokens, n].

    """
    for start, stop in _strips(total):
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def mirror(total: Tensor) -> Tensor:
    """Copy the upper triangle of a matrix [n, n] to the lower, in place; return it."""
    for start, stop in _strips(total):
        total[stop:, start:stop] = total[start:stop, stop:].T
        square = total[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
    return total


def mean_square(matrix: Tensor, hessian: Tensor) -> float:
    """Return ``tr(M H M^T)``: the mean squared size of M x, H being the mean of x x^T.

    Args:
        matrix: M, float32 [rows, n].
        hessian: H, float32 [n, n], symmetric.

    """
    total = 0.0
    for start, stop in _strips(hessian):
        own = matrix[:, start:stop]
        product = own @ hessian[start:stop, start:stop]
        product.addmm_(matrix[:, stop:], hessian[stop:, start:stop], alpha=2)
        total += product.mul_(own).sum(dtype=torch.float64).item()
    return max(total, 0.0)
