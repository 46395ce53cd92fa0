"""The grid that weights are rounded to: integer codes, a scale and a zero-point for each group of input channels.

A weight is stored as ``code``, an integer of ``bits`` bits in the signed range ``[-2^(bits-1), 2^(bits-1) - 1]``, and
read back as ``(code - zero_point) * scale``. One scale (and zero-point) serves ``group_size`` neighbouring input
channels of one output channel. This is the arithmetic of compressed-tensors' ``pack-quantized`` format.

Scales are always values of the dtype that they are stored in, so that what calibration saw is what serving reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quant_methods.formats.grid_search import best_candidates, serves

Search = Literal["minmax", "mse", "output"]

# Steps of the scale search, and the smallest fraction of the unclipped range that it tries. At 4 bits the best
# fraction of a Gaussian group of 128 lies near 0.8; heavy tails want less.
SEARCH_STEPS = 24
SEARCH_FLOOR = 0.4
# Groups whose candidates, 73 scales and zero-points each, are in memory together.
GROUPS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Grid:
    """Shape of a quantization grid.

    Attributes:
        bits: bits a code, 2 to 8.
        group_size: input channels that share one scale; -1 for a whole row ("per channel").
        symmetric: without zero-points (they are 0).
        per_tensor: all rows have the same scale and zero-point (``group_size`` is -1).

    """

    bits: int
    group_size: int
    symmetric: bool
    per_tensor: bool = False

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Return the number of groups in a row of ``columns`` input channels."""
        return 1 if self.group_size == -1 else columns // self.group_size

    def bits_per_weight(self, rows: int, columns: int, scale_bits: int = 16) -> float:
        """Return the storage of a [rows, columns] weight in bits a weight, scales and zero-points included."""
        overhead = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.groups(columns) / columns


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Return the nearest codes.

    Args:
        weight: [..., n] floating point.
        scale: broadcastable to ``weight``.
        zero_point: broadcastable to ``weight``.
        grid: the grid.

    Returns:
        Codes in ``weight``'s dtype and shape.

    """
    return torch.clamp(torch.round(weight / scale) + zero_point, grid.low, grid.high)


def expand(parameter: Tensor, columns: int) -> Tensor:
    """Repeat per-group values [rows, groups] to one value per input channel [rows, columns]."""
    rows, groups = parameter.shape
    return parameter[:, :, None].expand(rows, groups, columns // groups).reshape(rows, columns)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Read codes back.

    Args:
        codes: [rows, columns] integers of any dtype.
        scale: [rows, groups] in the stored dtype.
        zero_point: [rows, groups] integers.

    Returns:
        [rows, columns] float32 weights, ``(code - zero_point) * scale``.

    """
    grouped = codes.float().unflatten(1, (scale.shape[1], -1))
    return ((grouped - zero_point.float()[:, :, None]) * scale.float()[:, :, None]).flatten(1)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Return a weight [rows, columns] rounded to nearest, no range clipped: what searches of scales compare."""
    columns = weight.shape[1]
    scale, zero = fit(weight, grid, search="minmax")
    return dequantize(round_to_grid(weight, expand(scale, columns), expand(zero, columns), grid), scale, zero)


def fit(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor | None = None,
    search: Search = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Choose the scales and zero-points of a weight.

    ``minmax`` covers the largest weight of each group, as round-to-nearest does by convention. ``mse`` tries clipped
    ranges too and keeps the one with the least ``sum_j H_jj e_j^2``, e being a group's error: the layer's output error
    under uncorrelated inputs (the objective of OBQ, Frantar & Alistarh 2022, Eq. 3, with off-diagonal terms dropped).
    ``output`` keeps the one with the least ``e^T H e`` within the group: the mean square of what the group adds to the
    layer's output error (the clip search of AWQ, Lin et al. 2023, section 3.2 and its code).

    A symmetric grid has one more code below zero than above; a negative scale turns that around, so ``mse`` tries
    both signs (llama.cpp's Q4_0 does the same).

    Args:
        weight: [rows, columns] floating point; ``grid.group_size`` divides ``columns``.
        grid: the grid.
        hessian: [columns, columns], the mean of x x^T; None for equal weights.
        search: how the range is chosen.
        scale_dtype: dtype that scales are stored in; the result is rounded to it.

    Returns:
        (scale, zero_point), both [rows, groups] in ``weight``'s dtype; zero-points are integral.

    """
    rows, columns = weight.shape
    groups = grid.groups(columns)
    grouped = weight.reshape(rows, groups, columns // groups)
    importance = _importance(weight, hessian, groups, search)
    compiled = not grid.per_tensor and search != "minmax" and serves(grouped, importance)
    at_once = max(GROUPS_AT_ONCE // groups, 1)
    if compiled and rows > at_once:
        parts = [fit(part, grid, hessian, search, scale_dtype) for part in weight.split(at_once)]
        scales, zeros = zip(*parts, strict=True)
        return torch.cat(scales), torch.cat(zeros)
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0)
    if grid.per_tensor:
        low, high = low.amin(0, keepdim=True).expand_as(low), high.amax(0, keepdim=True).expand_as(high)

    def stored(scale: Tensor) -> Tensor:
        # A group of zeros: any scale reads back zeros. A subnormal scale would overflow the division.
        usable = torch.where(scale > torch.finfo(scale_dtype).tiny * 16, scale, torch.ones_like(scale))
        return usable.to(scale_dtype).to(weight.dtype)

    if grid.symmetric:
        extent = torch.maximum(-low, high)
        scale, widest = stored(extent * 2 / (grid.high - grid.low)), stored(extent / grid.high)
        zero = torch.zeros_like(scale)
    else:
        scale = widest = stored((high - low) / (grid.high - grid.low))
        zero = torch.round(grid.low - low / scale).clamp(grid.low, grid.high)
    if search == "minmax":
        return scale.squeeze(-1), zero.squeeze(-1)

    candidates = _candidates(grid, scale, zero, widest, low, high, stored)
    if compiled:
        return _by_kernel(grouped, importance, candidates, grid)
    return _by_operations(grouped, importance, candidates, grid)


def _candidates(
    grid: Grid,
    scale: Tensor,
    zero: Tensor,
    widest: Tensor,
    low: Tensor,
    high: Tensor,
    stored: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scales and zero-points to try, [rows, groups, 1]: first what clips nothing, which nothing may lose to.

    Args:
        grid: the grid.
        scale: that clips nothing; its zero-point is ``zero``.
        zero: see ``scale``.
        widest: the largest scale to try.
        low: of each group's weights, at most 0.
        high: of each group's weights, at least 0.
        stored: rounds a scale to what is stored.

    """
    yield scale, zero
    for step in range(SEARCH_STEPS):
        shrink = 1.0 - (1.0 - SEARCH_FLOOR) * step / SEARCH_STEPS
        scale = stored(widest * shrink)
        if grid.symmetric:
            zero = torch.zeros_like(scale)
            yield scale, zero
            yield -scale, zero
        else:
            # The zero-point that centres the clipped range on the group's range, and its neighbours.
            centre = torch.round((grid.low + grid.high) / 2 - (low + high) / 2 / scale)
            for offset in (0, -1, 1):
                yield scale, (centre + offset).clamp(grid.low, grid.high)


def _by_operations(
    grouped: Tensor, importance: Tensor, candidates: Iterable[tuple[Tensor, Tensor]], grid: Grid
) -> tuple[Tensor, Tensor]:
    """Return the best candidates, [rows, groups] each, by operations on all groups at once."""
    rows, groups, width = grouped.shape
    buffer = torch.empty_like(grouped)
    product = grouped.new_empty((groups, rows, width)) if importance.dim() == 3 else buffer
    best_error, best_scale, best_zero = (grouped.new_full((rows, groups, 1), torch.inf) for _ in range(3))
    for scale, zero in candidates:
        # round_to_grid and dequantize, in one buffer.
        torch.div(grouped, scale, out=buffer)
        buffer.round_().clamp_(grid.low - zero, grid.high - zero).mul_(scale).sub_(grouped)
        if importance.dim() == 2:
            error = buffer.square_().mul_(importance).sum(-1, keepdim=True)
        else:
            torch.bmm(buffer.transpose(0, 1), importance, out=product)
            error = buffer.mul_(product.transpose(0, 1)).sum(-1, keepdim=True)
        if grid.per_tensor:
            error = error.sum(0, keepdim=True).expand_as(error)
        better = error < best_error
        torch.where(better, error, best_error, out=best_error)
        torch.where(better, scale, best_scale, out=best_scale)
        torch.where(better, zero, best_zero, out=best_zero)
    return best_scale.squeeze(-1), best_zero.squeeze(-1)


def _by_kernel(
    grouped: Tensor, importance: Tensor, candidates: Iterable[tuple[Tensor, Tensor]], grid: Grid
) -> tuple[Tensor, Tensor]:
    """Return the same, compiled; errors are summed in another order."""
    scales, zeros = (torch.stack([x.squeeze(-1) for x in each]) for each in zip(*candidates, strict=True))
    return best_candidates(grouped, importance, scales, zeros, grid.low, grid.high)


def _importance(weight: Tensor, hessian: Tensor | None, groups: int, search: Search) -> Tensor:
    """Return [groups, width], or [groups, width, width] where errors within a group count together."""
    columns = weight.shape[1]
    width = columns // groups
    if hessian is None:
        return weight.new_ones((groups, width))
    if search != "output":
        return hessian.diagonal().to(weight.dtype).reshape(groups, width)
    return (
        hessian.to(weight.dtype)
        .unflatten(1, (groups, width))
        .unflatten(0, (groups, width))
        .diagonal(dim1=0, dim2=2)
        .permute(2, 0, 1)
        .contiguous()
    )


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Round activations to symmetric integers with one scale a token, and read them back.

    Args:
        x: [..., channels] floating point.
        bits: of an integer.

    """
    top = (1 << (bits - 1)) - 1
    scale = (x.abs().amax(-1, keepdim=True) / top).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.round(x / scale).clamp(-top - 1, top) * scale


def round_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round activations to integers with a scale and zero-point fixed at calibration, and read them back.

    Args:
        x: [..., channels] floating point.
        scale: [1].
        zero_point: [1], integral.
        bits: of an integer.

    """
    top = (1 << (bits - 1)) - 1
    scale, zero_point = scale.to(x.device), zero_point.to(x.device)
    codes = torch.clamp(torch.round(x / scale) + zero_point, -top - 1, top)
    return ((codes - zero_point) * scale).to(x.dtype)


def static_scale(sample: Tensor, largest: float, bits: int) -> Tensor:
    """Return the symmetric scale, float32 [1], that rounds a layer's inputs with the least squared error.

    Large models have single activations so large that covering them leaves nothing of the others: clipping is tried,
    down to a hundredth of the largest.

    Args:
        sample: inputs [tokens, in].
        largest: |x| over all calibration tokens.
        bits: of an integer.

    """
    top = (1 << (bits - 1)) - 1
    zero = sample.new_zeros(1)
    scales = [torch.full_like(zero, max(largest, 1e-12) * 0.01 ** (step / 96) / top) for step in range(97)]

    def lost(scale: Tensor) -> float:
        return (round_static(sample, scale, zero, bits) - sample).square().sum().item()

    return min(scales, key=lost).float()
