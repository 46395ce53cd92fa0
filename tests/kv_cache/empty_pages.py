"""Pages that nothing was written to yet, and where requests have theirs, for tests of the kernels."""

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


def scattered_table(lens: list[int], block_size: int, blocks: int) -> torch.Tensor:
    """A table of blocks, int32, for requests of ``lens`` tokens, no two of which share one of so many blocks.

    Entries beyond a request's blocks must never be followed.
    """
    counts = [-(-length // block_size) for length in lens]
    table = torch.full((len(lens), max(counts, default=0) + 2), 2**30, dtype=torch.int32)
    free = torch.randperm(blocks).int().split([*counts, blocks - sum(counts)])
    for row, ids in zip(table, free, strict=False):
        row[: len(ids)] = ids
    return table


def slots_of(row: torch.Tensor, tokens: int, block_size: int) -> torch.Tensor:
    """The slots, int64, of a request's first tokens by its row of the table."""
    positions = torch.arange(tokens)
    return row.long()[positions // block_size] * block_size + positions % block_size
