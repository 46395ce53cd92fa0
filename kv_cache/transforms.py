"""The matrices that let four bits cost less: a transform of the keys, and feedback of rounding errors.

An error e of a key moves a logit by ``q . e``, an error of a value moves what the layer adds to the residual stream by
``W_o e``. Both cost ``e^T H e``, with H a sum over queries of ``q q^T`` (weighed by what a logit's change does) or the
output projection's ``W_o^T W_o``. Rounding each channel by itself leaves errors that know nothing of H.

- `balanced_transform`: keys are rotated and scaled until their covariance and H are the same diagonal matrix, and then
  mixed, so that every channel has about the same spread and the same importance. With eigenvalues l of the product of
  both matrices, equal steps then cost ``mean(sqrt(l))^2`` instead of ``mean(l)`` (Cauchy-Schwarz). Mixing is what
  QuaRot (Ashkboos et al. 2024) does, balancing what SmoothAttention (QServe, Lin et al. 2024, section 4.2) does by
  channel.
- `feedback`: what quantize_with_feedback of kv_cache/codec.py takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RIDGE = 1e-4
"""Added to a matrix's diagonal, as a share of its mean: directions never seen must not be scaled without bound."""
TINY = 1e-12


def mixing(dim: int) -> Tensor:
    """Return an orthogonal matrix whose entries are about equally large, float64 [dim, dim].

    A Hadamard matrix of the largest power of two in ``dim``, times a discrete Hartley matrix for what is left.
    """
    power = dim & -dim
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    odd = dim // power
    angle = torch.outer(torch.arange(odd), torch.arange(odd)).double() * (2 * math.pi / odd)
    return torch.kron(hadamard, angle.cos() + angle.sin()) / math.sqrt(dim)


def _ridge(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    return matrix + (RIDGE * mean + TINY)[..., None, None] * torch.eye(matrix.shape[-1], dtype=torch.float64)


def balanced_transform(covariance: Tensor, metric: Tensor) -> Tensor:
    """Return T such that ``T x`` has channels of equal spread and equal importance.

    Args:
        covariance: [heads, dim, dim], of x.
        metric: [heads, dim, dim], H above.

    Returns:
        float64 [heads, dim, dim], invertible, scaled so that the mean variance of a channel of ``T x`` is 1.

    """
    root = torch.linalg.cholesky(_ridge(covariance))
    values, vectors = torch.linalg.eigh(root.mT @ _ridge(metric) @ root)
    spread = values.clamp_min(TINY).pow(0.25)  # square root of the variance that balances variance and importance
    balanced = spread[..., None] * (vectors.mT @ torch.linalg.inv(root))
    balanced = balanced / spread.square().mean(-1).sqrt()[..., None, None]
    return mixing(covariance.shape[-1]) @ balanced


def feedback(metric: Tensor, scale: Tensor) -> Tensor:
    """Return the feedback matrices for rounding under an error metric.

    Args:
        metric: [heads, dim, dim], H above, of what is coded (``T^-T H T^-1`` for transformed keys).
        scale: [heads, dim], of the codes.

    Returns:
        float32 [heads, dim, dim], strictly lower triangular: entry (i, j) is by how much an error of one code of
        channel i moves channel j, in its codes.

    """
    root = torch.linalg.cholesky(_ridge(metric))
    lower = root / root.diagonal(dim1=-2, dim2=-1)[..., None, :]  # H = L D L^T
    # e^T H e = sum_i D_i ((L^T e)_i)^2. A channel's rounding error u, feedback included, is its (L^T e)_i if it was fed
    # the rest of that sum, (L^T - 1) e = (1 - L^-T) u.
    fed = -torch.linalg.inv(lower)
    scale = scale.double()
    return (fed * scale[..., :, None] / scale[..., None, :]).tril(-1).float()


__all__ = ["balanced_transform", "feedback", "mixing"]
