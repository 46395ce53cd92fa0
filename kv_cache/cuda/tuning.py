"""How the decode kernel divides a multiprocessor: warps, steps and stages, by device and format."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

from kv_cache.errors import ParetoError
from kv_cache.formats import PLANES
from kv_cache.layout import TOKEN_MULTIPLE, PageLayout
from kv_cache.rotary import SPAN

ROW_TILE = 8
"""Query rows that the tensor cores multiply at once."""
IN_FLIGHT = 64 << 10
"""Bytes of codes that a multiprocessor reads ahead."""


@dataclass(frozen=True)
class Tuning:
    """Compile-time choices of ``csrc/decode.cu``.

    Attributes:
        row_tiles: eights of query rows that share one read of the codes: 1 to 4.
        warps: of a thread block.
        units: tokens of a warp's step, in sixteens.
        stages: steps that a warp reads ahead.
        blocks_per_sm: thread blocks that a multiprocessor holds at once.
        bulk_copy: whether codes come by Hopper's bulk copies instead of Ampere's asynchronous ones.
        shared_table: whether the table of positions lies in shared memory.

    """

    row_tiles: int
    warps: int = 8
    units: int = 2
    stages: int = 2
    blocks_per_sm: int = 1
    bulk_copy: bool = True
    shared_table: bool = True

    @property
    def rows(self) -> int:
        """Query rows of a row block."""
        return self.row_tiles * ROW_TILE

    def macros(self) -> tuple[tuple[str, int], ...]:
        """Return the macros that tell ``csrc/decode.cu``."""
        return tuple((name.upper(), int(value)) for name, value in asdict(self).items())

    def shared_bytes(self, layout: PageLayout) -> int:
        """Return the dynamic shared memory of a thread block, as ``csrc/decode.cu`` lays it out."""
        dim, steps = layout.head_dim, query_steps(layout)
        ring = self.stages * self.units * TOKEN_MULTIPLE * layout.bytes_per_token
        table = self.shared_table * SPAN * dim * 2
        bias = 0 if self.row_tiles * dim // 16 <= 16 else self.row_tiles * dim // 16 * 32 * 8
        query = 0 if self.row_tiles * steps <= 16 else self.row_tiles * steps * 32 * 8
        piece = self.rows * (16 + (dim + 16) * 4 + dim * 2) + (dim + 4) * 4 + query
        warp = ring + 2 * dim * 4 + bias + ROW_TILE // 2 * (dim + 4) * 4 + self.rows * 8 + 16 + self.stages * 8
        return self.warps * warp + table + 2 * piece + 16


def query_steps(layout: PageLayout) -> int:
    """Return the tensor-core products of 16 channels that one query row takes (``KeyShare::STEPS``)."""
    row = layout.row_bytes["key.0"]
    vector = 4 if row % 64 == 0 else 2 if row % 32 == 0 else 1
    return -(-row // (16 * vector)) * vector * (8 // PLANES[layout.fmt.key_bits][0])


def choose(layout: PageLayout, rows: int, capability: tuple[int, int], shared_per_block: int) -> Tuning:
    """Return the tuning for a format on a device.

    Args:
        layout: of a page.
        rows: most query rows (tokens times heads of a group) that a request has.
        capability: the device's compute capability.
        shared_per_block: most bytes of shared memory that a thread block may have.

    Raises:
        ParetoError: that is too little.

    """
    # Sums and queries of a row tile take registers in proportion to the head size.
    needed, most = -(-rows // ROW_TILE), min(512 // layout.head_dim, 4)
    for row_blocks in range(-(-needed // most), needed + 1):
        tiles = -(-needed // row_blocks)
        units = 2 if layout.bytes_per_token <= 132 and tiles <= 2 else 1
        # Codes of few bits are unpacked more slowly than they come, and 12 warps hide more of it: for 3 bits 96 us
        # instead of 105 at 32 x 8192 on an H100; 4 bits lose 1 us.
        few = tiles == 1 and layout.head_dim == 128 and layout.bytes_per_token <= 104
        for warps in (12, 8, 4, 2) if few else (8, 4, 2):
            # 64 KB on the way keep an H100's memory busy. More only queue, and whatever the kernel needs next (block
            # tables, the next piece) waits behind them: 192 KB cost 8% of the bandwidth at 32 x 8192.
            stages = min(max(round(IN_FLIGHT / (warps * units * TOKEN_MULTIPLE * layout.bytes_per_token)), 2), 4)
            for depth, shared_table in itertools.product(range(stages, 1, -1), (True, False)):
                tuning = Tuning(tiles, warps, units, depth, 1, capability >= (9, 0), shared_table)
                if tuning.shared_bytes(layout) <= shared_per_block:
                    return tuning
    raise ParetoError(f"{layout.fmt.name}: {shared_per_block} bytes of shared memory are too few for decode attention")
