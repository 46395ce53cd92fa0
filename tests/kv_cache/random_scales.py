"""Random scales for tests of the codec and of the kernels.

A coding is a format's name, or one followed by the parts of its scales: ``+feedback``, ``+transform`` (with feedback)
or ``+centred`` (with both).
"""

import torch

from kv_cache.formats import FORMATS, KVFormat
from kv_cache.rotary import Rotary
from kv_cache.scales import LayerScales
from kv_cache.transforms import mixing

CODINGS = [*FORMATS, "k8v4_per_head+feedback", "int4_per_head+transform", "int4_per_head+centred"]
MAX_POSITION = 5000


def coding(name: str) -> tuple[KVFormat, str]:
    fmt, _, parts = name.partition("+")
    return FORMATS[fmt], parts


def feedback(kv_heads: int, dim: int) -> torch.Tensor:
    """Return numbers of bfloat16, which is how a scales file keeps them."""
    return (torch.randn(kv_heads, dim, dim) / dim**0.5).bfloat16().float().tril(-1)


def inverse(matrix: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Newton's iteration: LAPACK may hang in a process that has started other threads."""
    for _ in range(4):
        near = near @ (2 * torch.eye(matrix.shape[-1], dtype=matrix.dtype) - matrix @ near)
    return near


def random_scales(name: str, kv_heads: int, dim: int) -> LayerScales | None:
    fmt, parts = coding(name)
    if not fmt.static:
        return None
    tops = [2**bits - 1 for bits in (fmt.key_bits, fmt.value_bits)]
    steps = [torch.rand(kv_heads, dim) * 4 / top + 2 / top for top in tops]
    zeros = [torch.rand(kv_heads, dim) * top for top in tops]
    more = {}
    if parts:
        more["value_feedback"] = feedback(kv_heads, dim)
    if parts in ("transform", "centred"):
        more["key_feedback"] = feedback(kv_heads, dim)
        spread = (0.5 + torch.rand(kv_heads, 1, dim)) * torch.randn(kv_heads, 1, dim).sign()
        order = torch.randperm(dim)
        transform = (mixing(dim)[:, order] * spread).bfloat16().double()
        more["key_transform"] = transform.float().contiguous()
        more["key_inverse"] = inverse(transform, (mixing(dim)[:, order] / spread).mT.double()).float().contiguous()
    if parts == "centred":
        more["key_mean"] = torch.randn(kv_heads, dim) * 2
        rotated = dim if dim != 96 else 64  # some models rotate part of the channels
        inv_freq = 10000.0 ** (-torch.arange(0, rotated, 2) / rotated)
        more["rotary"] = Rotary(inv_freq, MAX_POSITION, interleaved=dim == 80)
    return LayerScales(steps[0], zeros[0], steps[1], zeros[1], **more)
