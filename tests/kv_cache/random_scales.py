"""Random scales for tests of the codec and of the kernels."""

import torch

from kv_cache.scales import LayerScales


def random_scales(fmt, kv_heads: int, dim: int) -> LayerScales | None:
    if not fmt.static:
        return None
    tops = [2**bits - 1 for bits in (fmt.key_bits, fmt.value_bits)]
    steps = [torch.rand(kv_heads, dim) * 4 / top + 2 / top for top in tops]
    zeros = [torch.rand(kv_heads, dim) * top for top in tops]
    return LayerScales(steps[0], zeros[0], steps[1], zeros[1])
