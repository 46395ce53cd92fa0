"""How codes, and what goes with them, lie in memory for the CUDA kernel ``csrc/low_bit.cu``.

Codes of 2 to 7 bits, trellis codes, and codes with a bitmap.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

ROWS, CHANNELS = 32, 128
"""Of a unit; see ``csrc/low_bit_unit.cuh``."""
_AT_ONCE = 1 << 24
"""Codes that are packed at once."""


def runs(bits: int, table: bool) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield where the bits of a lane's 32 codes of a row of a unit lie in its ``bits`` words.

    Args:
        bits: of a code.
        table: whether the codes are a table's indices.

    Yields:
        A code's index, a bit of it, a number of bits from there, the word and the bit in the word where they begin.

    """
    fields = 16 // bits
    for code in range(32):
        pair, half = code // 2, 16 * (code % 2)
        if table and (bits == 4 or code < 24):
            yield code, 0, bits, code // 8, 4 * (code % 8)
        elif table:
            yield from ((code, bit, 1, bit, 4 * (code % 8) + 3) for bit in range(bits))
        elif pair < fields * bits:
            yield code, 0, bits, pair // fields, bits * (pair % fields) + half
        else:
            left = 16 - fields * bits
            for bit in range(bits):
                n = (pair - fields * bits) * bits + bit
                yield code, bit, 1, n // left, fields * bits + n % left + half


def pack(codes: Tensor, bits: int, table: bool = False) -> Tensor:
    """Lay codes out as the kernel reads them.

    Args:
        codes: uint8 [rows, channels] from 0.
        bits: 2 to 7.
        table: whether they are a table's indices.

    Returns:
        int32 [row tiles, units, 128 * bits].

    """
    rows, channels = codes.shape
    tiles, units = -(-rows // ROWS), -(-channels // CHANNELS)
    words = torch.zeros(tiles, units, bits, 32, 4, dtype=torch.int32, device=codes.device)
    at_once = max(_AT_ONCE // (units * CHANNELS * ROWS), 1)
    for start in range(0, tiles, at_once):
        stop = min(start + at_once, tiles)
        part = codes.new_zeros((stop - start) * ROWS, units * CHANNELS)
        given = codes[start * ROWS : stop * ROWS]
        part[: len(given), :channels] = given
        # Axes: tile, row r, row g, unit, 32 channels j, t, code; then code (j first), tile, unit, lane (g, t), row r.
        split = part.reshape(stop - start, 4, 8, units, 4, 4, 8).permute(4, 6, 0, 3, 2, 5, 1)
        each = split.reshape(32, stop - start, units, 32, 4).int()
        for code, bit, count, word, at in runs(bits, table):
            words[start:stop, :, word] |= ((each[code] >> bit) & ((1 << count) - 1)) << at
    return words.flatten(2)


def pack_trellis(words: Tensor) -> Tensor:
    """Lay a trellis code's streams out as the kernel reads them: words change places, and tiles of zeros fill units.

    Args:
        words: int32 [row tiles, channels / 8, 8 * bits], see ``quant_methods/formats/parts/trellis.py``.

    Returns:
        int32 [row tiles, units, 128 * bits].

    """
    tiles, across, bits = words.shape[0], words.shape[1], words.shape[2] // 8
    padded = functional.pad(words, (0, 0, 0, -across % (CHANNELS // 8)))
    # Axes: tile, unit, 32 channels j, t, g, word; then tile, unit, word, lane (g, t), j.
    return padded.reshape(tiles, -1, 4, 4, 8, bits).permute(0, 1, 5, 4, 3, 2).flatten(2)


def pack_semi_sparse(codes: Tensor, places: Tensor) -> Tensor:
    """Lay 2:4 codes out as the kernel reads them; what fills units has the first two places of four.

    Args:
        codes: uint8 [rows, channels / 2] from 0 to 15, the kept ones.
        places: uint8 [rows, channels / 4], see ``quant_methods/formats/parts/semi_sparse.py``.

    Returns:
        int32 [row tiles, units, 384].

    """
    rows, fours = places.shape
    tiles, units = -(-rows // ROWS), -(-fours // (CHANNELS // 4))
    words = torch.empty(tiles, units, 3, 32, 4, dtype=torch.int32, device=codes.device)
    at_once = max(_AT_ONCE // (units * CHANNELS * ROWS), 1)
    for start in range(0, tiles, at_once):
        stop = min(start + at_once, tiles)
        size, some = ((stop - start) * ROWS, units * CHANNELS // 4), slice(start * ROWS, stop * ROWS)
        kept = codes.new_zeros(size[0], 2 * size[1])
        where = places.new_full(size, 0b0100)
        kept[: len(codes[some]), : 2 * fours], where[: len(places[some]), :fours] = codes[some], places[some]
        # Axes: tile, rows from 16 i, from 8 h, row g, unit, 32 channels (j in two numbers), 16 channels s, four t, kept
        # one; then those that share a word (s, h, kept one), and tile, unit, j's first, lane (g, t), j's second, i.
        each = kept.reshape(stop - start, 2, 2, 8, units, 2, 2, 2, 4, 2).permute(7, 2, 9, 0, 4, 5, 3, 8, 6, 1).int()
        # The words that they make do not overlap, so that sums set their bits; int32 wraps around into the sign bit.
        parts = [each[s, h, k] << 4 * (h + 2 * s) + 16 * k for s in range(2) for h in range(2) for k in range(2)]
        words[start:stop, :, :2] = sum(parts[1:], parts[0]).reshape(stop - start, units, 2, 32, 4)
        # Axes: tile, i, h, g, unit, 32 channels j, 16 channels s, four n; then (h, n), tile, unit, lane (g, i, s), j.
        nibbles = where.reshape(stop - start, 2, 2, 8, units, 4, 2, 4).permute(2, 7, 0, 4, 3, 1, 6, 5).int()
        parts = [nibbles[h, n] << 16 * h + 4 * n for h in range(2) for n in range(4)]
        words[start:stop, :, 2] = sum(parts[1:], parts[0]).reshape(stop - start, units, 32, 4)
    return words.flatten(2)


def pack_bitmap(bitmap: Tensor) -> Tensor:
    """Lay a bitmap out as the kernel reads it: a lane's words of a unit lie together, and zeros fill units.

    Args:
        bitmap: int32 [row tiles, channels / 32, 32], see ``quant_methods/formats/parts/bitmap_codes.py``.

    Returns:
        int32 [row tiles, units, 128].

    """
    padded = functional.pad(bitmap, (0, 0, 0, -bitmap.shape[1] % 4))
    return padded.unflatten(1, (-1, 4)).transpose(2, 3).flatten(2)


def by_group(values: Tensor, width: int, trellis: bool) -> Tensor:
    """Lay out what the groups of the rows have, with zeros in the rows and groups that fill units.

    Args:
        values: [rows, groups, ...].
        width: of a group, in channels.
        trellis: whether lanes have the rows that they have of a trellis code.

    Returns:
        [row tiles, groups, 8 lanes g, 4 rows r, ...].

    """
    rows, groups = values.shape[:2]
    each = CHANNELS // width
    padded = values.new_zeros(-(-rows // ROWS) * ROWS, -(-groups // each) * each, *values.shape[2:])
    padded[:rows, :groups] = values
    if trellis:
        return padded.unflatten(0, (-1, 8, 4)).movedim(3, 1).contiguous()
    return padded.unflatten(0, (-1, 4, 8)).transpose(1, 2).movedim(3, 1).contiguous()
