"""The matrices that make channels even, so that all can share a token's scale: one of keys, one of values.

An error e of a key moves a logit by ``q . e``; it costs ``e^T H e``, with H a sum over queries of ``q q^T``, weighed by
what a logit's change does.

- `balanced_transform`: keys are rotated and scaled until their covariance and H are the same diagonal matrix, and then
  mixed, so that every channel has about the same spread and the same importance. With eigenvalues l of the product of
  both matrices, equal steps then cost ``mean(sqrt(l))^2`` instead of ``mean(l)`` (Cauchy-Schwarz). Mixing is what
  QuaRot (Ashkboos et al. 2024) does, balancing what SmoothAttention (QServe, Lin et al. 2024, section 4.2) does by
  channel. The direction of the widest spread meets the mixing matrix' first column, which is constant: what it adds to
  a token is the same in every channel, so that the token's zero takes it and its range need not.
- `hadamard_sums`: values are mixed, once a reflection (`mirror_to_constant`) has taken the direction in which most of
  them lie to where the mixing is constant, for the same reason. Both are orthogonal. What else a calibration knows of
  values, their mean and their channels' spread, did harm: tokens' values differ in size by ten times, and the small
  ones, the first token's above all, are those that attention looks at (docs/kv-study.md).
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
    # The widest spread first; eigh returns it last.
    values, vectors = values.flip(-1), vectors.flip(-1)
    spread = values.clamp_min(TINY).pow(0.25)  # square root of the variance that balances variance and importance
    balanced = spread[..., None] * (vectors.mT @ torch.linalg.inv(root))
    balanced = balanced / spread.square().mean(-1).sqrt()[..., None, None]
    return mixing(covariance.shape[-1]) @ balanced


def mirror(normal: Tensor) -> Tensor:
    """Return n, along normals [..., dim], of the reflection ``x - n (n . x)``: its length is sqrt(2)."""
    return torch.nn.functional.normalize(normal, dim=-1) * math.sqrt(2)


def mirror_to_constant(directions: Tensor) -> Tensor:
    """Return n of the reflection ``x - n (n . x)`` of the main direction to what `hadamard_sums` makes constant.

    A Householder reflection (Householder 1958), of which n is the normal times sqrt(2).

    Args:
        directions: [heads, dim, dim], the mean of ``x x^T / |x|^2``: a vector counts whatever its size.

    Returns:
        float64 [heads, dim].

    """
    dim = directions.shape[-1]
    main = torch.linalg.eigh(directions.double())[1][..., -1]
    constant = torch.zeros(dim, dtype=torch.float64)
    # Mixing spreads the first channel of a run evenly over the run.
    constant[:: dim & -dim] = 1
    constant /= constant.norm()
    # A direction has no sign. With this one the difference is long, and its direction exact.
    main = torch.where((main @ constant)[:, None] > 0, -main, main)
    return mirror(main - constant)


def hadamard_sums(x: Tensor) -> Tensor:
    """Multiply runs of channels by an unscaled Hadamard matrix (Sylvester's), in x's dtype.

    A run is as long as the largest power of two that divides the number of channels. Sums and differences of
    neighbours come first, then those of neighbouring pairs, and so on: kernels that do the same round alike. Done
    twice, it multiplies x by the length of a run.

    Args:
        x: floating point [..., channels].

    """
    dim = x.shape[-1]
    run, stride = dim & -dim, 1
    while stride < run:
        a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        stride *= 2
    return x


__all__ = ["balanced_transform", "hadamard_sums", "mirror", "mirror_to_constant", "mixing"]
