"""A trellis code: each pair of weights is a hash of 16 bits of a stream, of which neighbouring pairs share most.

Tseng, Sun, Hou, De Sa: "QTIP: Quantization with Trellises and Incoherence Processing" (2024),
https://arxiv.org/abs/2406.11235: a bit-shift trellis (section 3.2) whose values a hash computes (section 3.1.1), and
tail-biting streams (section 3.3). ``bits`` a weight then choose among far more than 2^bits values, which takes more
than a third of a grid's error on a Gaussian away. What differs: a state means two weights, each the sum of two bfloat16
numbers (the paper's "3INST" adds float16 numbers), because tensor cores want pairs and models are served in bfloat16;
and tiles are 32 rows by 8 channels, so that GPTQ's feedback passes on errors every 8 channels.

A tile of 32 output channels by 8 input channels is a stream of 256 x bits bits, in 8 x bits int32 words, the first bits
in the lowest place of the first word. Pair p of a tile's 128, row by row, is a hash of the 16 bits from 2 x bits x p;
behind the last bit comes the first one again.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TILE_ROWS, TILE_CHANNELS = 32, 8
TILE_PAIRS = TILE_ROWS * TILE_CHANNELS // 2
STATE_BITS = 16
STATES = 1 << STATE_BITS
MULTIPLIERS, INCREMENTS = (89226354, 2654435769), (64248484, 374761393)
"""Of the two linear congruential generators, for a pair's first and second weight; modulo 2^32."""
KEEP, FLIP = 0x81FF, 0x3F00
"""Sign, the lowest two bits of the exponent and the mantissa of a bfloat16, and what puts its exponent near 1."""


@functools.cache
def pair_values(device: torch.device | str = "cpu") -> Tensor:
    """Return what each state means: float32 [65536, 2], sums of two bfloat16 numbers rounded to bfloat16.

    A generator's 32 bits are two halves; of each, the bits of ``KEEP`` are kept, those of ``FLIP`` flipped, and the
    result read as a bfloat16. The values of all states have mean 0 and look like a Gaussian's.
    """
    state = torch.arange(STATES, dtype=torch.int64)
    pairs = []
    for multiplier, increment in zip(MULTIPLIERS, INCREMENTS, strict=True):
        mixed = (state * multiplier + increment) & 0xFFFFFFFF
        low, high = (
            ((half & KEEP) ^ FLIP).to(torch.int32).to(torch.int16).view(torch.bfloat16)
            for half in (mixed & 0xFFFF, mixed >> 16)
        )
        pairs.append(low + high)
    return torch.stack(pairs, 1).float().to(device)


def states_of(words: Tensor, bits: int) -> Tensor:
    """Return the states of streams.

    Args:
        words: int32 [..., 8 * bits].
        bits: a weight, 2 to 4.

    Returns:
        int64 [..., 128], from 0 to 65535.

    """
    first = 2 * bits * torch.arange(TILE_PAIRS, device=words.device)
    word, at = first // 32, first % 32
    unsigned = words.long() & 0xFFFFFFFF
    both = unsigned[..., word] | unsigned[..., (word + 1) % (8 * bits)] << 32
    return both >> at & (STATES - 1)


def words_of(states: Tensor, bits: int) -> Tensor:
    """Return streams from their states, which agree where they overlap; the inverse of :func:`states_of`.

    Args:
        states: int64 [..., 128].
        bits: a weight, 2 to 4.

    Returns:
        int32 [..., 8 * bits].

    """
    step = 2 * bits
    new = states & ((1 << step) - 1)
    each = new[..., None] >> torch.arange(step, device=states.device) & 1
    stream = each.flatten(-2).unflatten(-1, (8 * bits, 32))
    word = (stream << torch.arange(32, device=states.device)).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int()


def tiles_of(matrix: Tensor) -> Tensor:
    """Return the pairs of the tiles of a matrix.

    Args:
        matrix: [rows, channels], whole tiles.

    Returns:
        [row tiles, channel tiles, 128, 2].

    """
    rows, channels = matrix.shape
    split = matrix.reshape(rows // TILE_ROWS, TILE_ROWS, channels // TILE_CHANNELS, TILE_CHANNELS)
    return split.transpose(1, 2).reshape(*split.shape[:1], split.shape[2], TILE_PAIRS, 2)


def matrix_of(tiles: Tensor) -> Tensor:
    """Return the matrix [rows, channels] from the pairs of its tiles; the inverse of :func:`tiles_of`."""
    across, along = tiles.shape[:2]
    split = tiles.reshape(across, along, TILE_ROWS, TILE_CHANNELS)
    return split.transpose(1, 2).reshape(across * TILE_ROWS, along * TILE_CHANNELS)
