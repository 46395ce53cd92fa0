"""Levels of least squared error for numbers of a known distribution (Lloyd 1957/1982, Max 1960)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.cache
def normal_levels(bits: int) -> Tensor:
    """Return the ``2**bits`` levels of a standard normal distribution, float64, in increasing order.

    The conditions: a border is the middle of two levels, a level the mean of what lies between its borders.
    """
    count = 2**bits
    levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(20_000):
        borders = torch.cat([torch.tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([math.inf])])
        density = torch.exp(-borders.square() / 2) / math.sqrt(2 * math.pi)
        moved = (density[:-1] - density[1:]) / torch.special.ndtr(borders).diff()
        if (moved - levels).abs().max() < 1e-12:
            break
        levels = moved
    return levels


def fitted_levels(x: Tensor, weight: Tensor, bits: int, rounds: int = 100) -> Tensor:
    """Return the levels of least weighted squared error for given numbers.

    Args:
        x: float [n].
        weight: float [n], not negative.
        bits: of a code.
        rounds: of Lloyd's iteration, which starts at quantiles.

    Returns:
        float32 [2**bits], in increasing order.

    """
    x, order = x.double().sort()
    weight = weight.double()[order].clamp_min(1e-30)
    mass, moment = (torch.nn.functional.pad(part.cumsum(0), (1, 0)) for part in (weight, weight * x))
    count = 2**bits
    share = (torch.arange(count, device=x.device, dtype=torch.float64) + 0.5) / count
    levels = x[torch.searchsorted(mass[1:], share * mass[-1]).clamp_max(len(x) - 1)]
    for _ in range(rounds):
        borders = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(x))])
        inside = mass[ends].diff()
        levels = torch.where(inside > 0, moment[ends].diff() / inside.clamp_min(1e-300), levels).sort().values
    return levels.float()


def nearest(levels: Tensor, x: Tensor) -> Tensor:
    """Return the nearest of some levels, in increasing order, to each number of x."""
    return levels[torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)]
