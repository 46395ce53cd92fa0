"""KIVI (Liu et al. 2024, "KIVI: a tuning-free asymmetric 2bit quantization for KV cache").

Keys: each channel's groups of consecutive tokens share a step and a smallest number. Values: each token's groups of
channels do. The newest tokens stay in full precision: up to 128 of the keys, which are coded together once they are
128, and 128 of the values, of which the oldest is coded as each new one comes (the authors' models/llama_kivi.py).

Why it cannot be paged as it is: the newest tokens of every sequence need 128 tokens' full room in every layer beside
the pages, the keys of the last page move from one room to the other, and a prefix that is shared ends at a multiple of
128 tokens. Keys of a group that is not full cannot be coded, so pages of 16 tokens need their own rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.simulate.coder import Coder, Decoded, Run, Shape, all_but_newest, whole_tiles, with_exact
from kv_cache.simulate.uniform import HALF_PAIR_BITS, between_ends

RESIDUAL = 128
"""Newest tokens in full precision."""


class Kivi(Coder):
    """Coded per channel (keys) and per token (values)."""

    def __init__(self, bits: int, group: int) -> None:
        """Choose bits and the numbers of a group: tokens of keys, channels of values (at most a head's)."""
        self.code_bits, self.group = bits, group

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Code whole tiles of keys, and all values."""
        whole = key.shape[1] // RESIDUAL * RESIDUAL
        groups = key[:, :whole].unflatten(1, (-1, self.group))
        read = torch.cat([between_ends(groups, self.code_bits, 2).flatten(1, 2), key[:, whole:]], 1)
        channels = value.unflatten(-1, (-1, min(self.group, value.shape[-1])))
        # The newest value is seen beside the 128 before it.
        coded_values = all_but_newest(value, RESIDUAL + 1)
        read_value = between_ends(channels, self.code_bits).flatten(-2)
        return Decoded(read, read_value, whole_tiles(key, RESIDUAL), coded_values)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the bits where half of the keys' residual, on average, and all of the values' is in use."""
        key = with_exact(self.code_bits + HALF_PAIR_BITS / self.group, RESIDUAL / 2, tokens)
        channels = min(self.group, shape.head_dim)
        return (key + with_exact(self.code_bits + HALF_PAIR_BITS / channels, RESIDUAL, tokens)) / 2
