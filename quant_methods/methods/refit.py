"""Fits the weights that pruning left to what the dense layer puts out; what is zero stays zero.

Of each output channel, with target w, support S and Hessian H, the weights ``H_SS^-1 (H w)_S`` have the least
``(v - w) H (v - w)^T``. A factorization for each channel would cost ``|S|^3 / 3`` each. Boza: "Fast and Effective
Weight Update for Pruned Large Language Models" (2024), https://arxiv.org/abs/2401.02938, comes near them for all
channels at once by ADMM, with products by ``(H + rho I)^-1``. Conjugate gradients (Hestenes and Stiefel, 1952) with
``(H^-1)_SS`` as the preconditioner take two such products an iteration: on correlated inputs six come as near as thirty
iterations of ADMM, and none adds to the error, which ADMM's may.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.tf32 import tf32

ITERATIONS = 30
"""At most. Half as many were enough wherever it was tried."""
CLOSE = 1e-8
"""It ends when the squared residual, in the preconditioner's metric, has fallen to this fraction in every channel."""


def refit(target: Tensor, start: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """Return the weights on a support that come nearest to a target, by what the layer puts out.

    Args:
        target: [rows, columns] float32 or float64; the arithmetic runs in this dtype.
        start: like ``target``, zero outside of the support; no row of the result is further from the target.
        kept: bool [rows, columns], the support.
        hessian: float64 [columns, columns], positive definite.

    Returns:
        Like ``target``, zero outside of the support.

    """
    dtype = target.dtype
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).to(dtype)
    metric = hessian.to(dtype)
    # TF32's rounding would end the descent early.
    with tf32(False):
        found = start.clone()
        residual = _on(kept, (target - found) @ metric)
        direction = near = _on(kept, residual @ inverse)
        size = _dot(residual, near)
        enough = size * CLOSE
        for _ in range(ITERATIONS):
            if (size <= enough).all():
                break
            change = _on(kept, direction @ metric)
            step = size / _positive(_dot(direction, change))
            found += step * direction
            residual -= step * change
            near = _on(kept, residual @ inverse)
            before, size = size, _dot(residual, near)
            direction = near + size / _positive(before) * direction
        better = _distance(found - target, metric) <= _distance(start - target, metric)
    return torch.where(better, found, start)


def _on(kept: Tensor, matrix: Tensor) -> Tensor:
    """Return a matrix with zeros outside of the support; in place."""
    return matrix.masked_fill_(~kept, 0)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of rows, [rows, 1]."""
    return (left * right).sum(1, keepdim=True)


def _distance(error: Tensor, metric: Tensor) -> Tensor:
    return _dot(error @ metric, error)


def _positive(sizes: Tensor) -> Tensor:
    """Return divisors: a row that has arrived has no residual, and stays where it is."""
    return sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
