"""KVarN (Muller et al. 2026, "Variance-normalized KV-cache quantization", arXiv 2606.03458).

Keys and values are mixed by a Hadamard matrix and cut into tiles of 128 tokens of one head. A tile is divided by a
scale for each channel and one for each token, found by dividing by the standard deviations of columns and rows in turn,
in logarithms, and keeping the best balance seen (Sinkhorn's iteration; the authors' sinkhorn.py, whose limits these
are). Then each channel of keys, or each token of values, is coded between its ends; its scale goes into the step and
the smallest number, the other scale is kept beside them. The first 128 tokens and the tile that is not full are not
coded.

In vLLM the authors' fork serves it with pages of one tile and a pool beside them for the first and the newest tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kv_cache.simulate.coder import Coder, Decoded, Run, Shape, first_exact, whole_tiles, with_exact
from kv_cache.simulate.uniform import between_ends, half
from kv_cache.transforms import hadamard_sums

TILE = 128
SINK = 128
"""Tokens at the start that are not coded."""
ITERATIONS = 16
LOG_LIMITS = (-0.3, 10.0)
DEVIATION_LIMITS = (1e-3, 1e3)


class KVarN(Coder):
    """``kvarn_kKvV_g128``."""

    def __init__(self, key_bits: int, value_bits: int) -> None:
        self.key_bits, self.value_bits = key_bits, value_bits

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Code whole tiles."""
        coded = whole_tiles(key, TILE)
        read_key = self._read(key, self.key_bits, by_channel=True)
        return Decoded(read_key, self._read(value, self.value_bits, by_channel=False), coded, coded)

    @staticmethod
    def _read(x: Tensor, bits: int, by_channel: bool) -> Tensor:
        dim, whole = x.shape[-1], x.shape[1] // TILE * TILE
        if not whole:
            return x
        run = math.sqrt(dim & -dim)
        tile = (
            (hadamard_sums(x[:, :whole]) / run).unflatten(1, (-1, TILE)).transpose(2, 3)
        )  # [..., heads, tokens, channels]
        tile = tile.mT if by_channel else tile
        column, row = balanced(tile)
        read = between_ends(tile / column / row, bits) * half(column) * row
        read = read.mT if by_channel else read
        coded = hadamard_sums(read.transpose(2, 3).flatten(1, 2)) / run
        return first_exact(torch.cat([coded, x[:, whole:]], 1), x, SINK)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return codes and scales: three float16 numbers for each row and column pair of a tile, and exact tokens."""
        dim = shape.head_dim
        key = self.key_bits + 16 * (2 * dim + TILE) / (dim * TILE)
        value = self.value_bits + 16 * (2 * TILE + dim) / (dim * TILE)
        return with_exact((key + value) / 2, SINK + TILE / 2, tokens)


def balanced(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales of columns [..., 1, columns] and rows [..., rows, 1] that give both about equal deviations."""
    column, row = tile.new_zeros(*tile.shape[:-2], 1, tile.shape[-1]), tile.new_zeros(*tile.shape[:-1], 1)
    best_column, best_row, best = column, row, _imbalance(tile)
    for _ in range(ITERATIONS):
        deviation = (tile / column.exp() / row.exp()).std(-2, keepdim=True).clamp(*DEVIATION_LIMITS)
        column = (column + deviation.log()).clamp(*LOG_LIMITS)
        deviation = (tile / column.exp() / row.exp()).std(-1, keepdim=True).clamp(*DEVIATION_LIMITS)
        row = (row + deviation.log()).clamp(*LOG_LIMITS)
        reached = _imbalance(tile / column.exp() / row.exp())
        better = (reached < best)[..., None, None]
        best_column, best_row = torch.where(better, column, best_column), torch.where(better, row, best_row)
        best = torch.minimum(best, reached)
    return best_column.exp(), best_row.exp()


def _imbalance(tile: Tensor) -> Tensor:
    """Return how uneven the deviations of columns and of rows are, [...]; 2 where all are equal."""
    columns, rows = tile.std(-2), tile.std(-1)
    return columns.amax(-1) / columns.amin(-1).clamp_min(1e-8) + rows.amax(-1) / rows.amin(-1).clamp_min(1e-8)
