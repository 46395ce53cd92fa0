"""Speed of the search for a trellis code's streams: compiled for the device, and by PyTorch's operations on it.

Gaussian targets; weights as the trellis method gives them, a row's factor times a channel's. On a GPU a call of so many
tiles is timed by the device's own events, with fresh targets; on a CPU by the seconds that all threads ran.

    python -m bench.lab.trellis_search_bench --bits 4 3 2 --tiles 1 18 128 448 4096
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_timer import median_seconds
from kv_cache.errors import ParetoError
from quant_methods.formats.parts.trellis import (
    TILE_CHANNELS,
    TILE_PAIRS,
    TILE_ROWS,
    pair_values,
    tiles_of,
)
from quant_methods.kernels.trellis_search import search, search_in_torch

MOST_IN_TORCH = 256
"""Tiles that PyTorch's operations are timed on, at most: they take long, and their speed no longer grows."""


def inputs(tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return targets and weights [tiles, 128, 2]."""
    generator = torch.Generator().manual_seed(tiles)
    targets = torch.randn(tiles, TILE_PAIRS, 2, generator=generator) * pair_values().std() / 1.07
    rows = torch.rand(tiles * TILE_ROWS, 1, generator=generator) + 0.1
    channels = torch.rand(TILE_CHANNELS, generator=generator) + 0.1
    return targets.to(device), tiles_of(rows * channels)[:, 0].contiguous().to(device)


def seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the seconds that a call takes of a GPU, the median, or of a CPU's cores together, the least."""
    if device.type == "cuda":
        return median_seconds(work, repeats)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2], help="of a weight")
    parser.add_argument("--tiles", nargs="+", type=int, default=[1, 18, 128, 448, 4096], help="of a call")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="calls (default: %(default)s)")
    parser.add_argument("--without-torch", action="store_true", help="leave PyTorch's operations out")
    args = parser.parse_args(argv)
    try:
        if min(args.tiles) < 1 or args.repeats < 1:
            raise ParetoError("--tiles and --repeats: expected numbers from 1 on")
        device = torch.device(args.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ParetoError("no CUDA device here: --device cpu measures this machine's cores")
        print("| bits | tiles | weights | ms a call | tiles/s | weights/s | tiles/s by PyTorch | error |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for bits in args.bits:
            for tiles in args.tiles:
                for line in measured(bits, tiles, device, args.repeats, args.without_torch):
                    print(line, flush=True)
    except ParetoError as error:
        print(f"trellis_search_bench: error: {error}", file=sys.stderr)
        return 2
    return 0


def measured(bits: int, tiles: int, device: torch.device, repeats: int, without_torch: bool) -> list[str]:
    """Return a table's rows for calls without weights and with them."""
    lines, values = [], pair_values(device)
    targets, weights = inputs(tiles, device)
    for given in (None, weights):
        took = seconds(functools.partial(search, targets, bits, given), repeats, device)
        # As a share of the targets' squares: Gaussian, it is that of a variance of 1.
        counts = torch.ones_like(targets) if given is None else given
        squares = (values[search(targets, bits, given)] - targets).square() * counts
        error = float(squares.sum() / (targets.square() * counts).sum())
        slow = "-"
        if not without_torch:
            few = targets[:MOST_IN_TORCH], None if given is None else given[:MOST_IN_TORCH]
            by_torch = seconds(functools.partial(search_in_torch, few[0], bits, few[1]), 1, device)
            slow = f"{len(few[0]) / by_torch:,.1f}"
        rate = tiles / took
        lines.append(
            f"| {bits} | {tiles} | {'all 1' if given is None else 'own'} | {1e3 * took:.2f} | {rate:,.0f} | "
            f"{rate * 2 * TILE_PAIRS:,.0f} | {slow} | {error:.5f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
