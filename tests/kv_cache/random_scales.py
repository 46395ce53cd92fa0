"""Random scales for tests of the codec and of the kernels."""

import torch

from kv_cache.rotary import Rotary
from kv_cache.scales import LayerScales
from kv_cache.transforms import mirror, mixing

MAX_POSITION = 5000


def inverse(matrix: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Newton's iteration: LAPACK may hang in a process that has started other threads."""
    for _ in range(4):
        near = near @ (2 * torch.eye(matrix.shape[-1], dtype=matrix.dtype) - matrix @ near)
    return near


def random_rotary(dim: int) -> Rotary:
    """All channels rotated, or (head size 96) a part of them, or (head size 80) in interleaved pairs."""
    rotated = dim if dim != 96 else 64
    inv_freq = 10000.0 ** (-torch.arange(0, rotated, 2) / rotated)
    return Rotary.over(dim, inv_freq, MAX_POSITION, interleaved=dim == 80)


def random_scales(kv_heads: int, dim: int) -> LayerScales:
    """Scales that bring keys of a spread of about 1 around their centre, and values of size 1, to size 1."""
    spread = (0.5 + torch.rand(kv_heads, 1, dim)) * torch.randn(kv_heads, 1, dim).sign()
    order = torch.randperm(dim)
    transform = (mixing(dim)[:, order] * spread).bfloat16().double()
    return LayerScales(
        key_mean=torch.randn(kv_heads, dim) * 2,
        key_first=torch.randn(kv_heads, dim) * 4,
        key_transform=transform.float().contiguous(),
        key_inverse=inverse(transform, (mixing(dim)[:, order] / spread).mT.double()).float().contiguous(),
        value_size=0.5 + torch.rand(kv_heads),
        value_mirror=mirror(torch.randn(kv_heads, dim)),
        rotary=random_rotary(dim),
    )
