"""Pages that nothing was written to yet, for tests of the kernels."""

import torch

from kv_cache.layout import PageLayout


def empty_pages(layout: PageLayout, blocks: int, kv_heads: int, padded: bool) -> torch.Tensor:
    """Pages of 0xff, which are NaN where a float16 is read; with room between heads and blocks if padded.

    Unpadded, the last page ends where the memory ends.
    """
    page, pad = layout.page_bytes, 48 if padded else 0
    strides = (kv_heads * (page + pad) + 2 * pad, page + pad, layout.bytes_per_token, 1)
    size = (blocks - 1) * strides[0] + (kv_heads - 1) * strides[1] + page
    shape = (blocks, kv_heads, layout.block_size, layout.bytes_per_token)
    return torch.full((size,), 255, dtype=torch.uint8).as_strided(shape, strides)
