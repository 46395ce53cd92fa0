"""A block of GPTQ's loop in one launch, in Triton; ``quant_methods.methods.feedback.feed_back`` is its specification.

The loop rounds one input channel at a time, and on a GPU each of a dozen small operations for it takes longer to launch
than to run. Here a program takes a few output channels through a whole block of input channels, whose weights stay in
registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kv_cache.doors import expect, is_vector

ROWS = 16
"""Output channels of a program."""


@triton.jit
def _round_block(
    work, upper, scale, zero, group_of, codes, errors, rows, columns, start, low, high,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round the channels from ``start`` to before ``start + WIDTH``; tensors are [channels or groups, rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    tile = tl.load(
        work + (start + channel)[:, None] * rows + row[None, :], mask=inside[:, None] & there[None, :], other=0
    )
    for j in range(WIDTH):
        group = tl.load(group_of + start + j)
        s = tl.load(scale + group * rows + row, mask=there, other=1)
        z = tl.load(zero + group * rows + row, mask=there, other=0)
        weight = tl.sum(tl.where(channel[:, None] == j, tile, 0.0), 0)
        # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, below 2^22.
        steps = tl.minimum(tl.maximum(tl.div_rn(weight, s), -1048576.0), 1048576.0)
        code = (steps + 12582912.0) - 12582912.0 + z
        code = tl.minimum(tl.maximum(code, low), high)
        at = (start + j) * columns + start
        error = tl.div_rn(weight - (code - z) * s, tl.load(upper + at + j))
        tl.store(codes + (start + j) * rows + row, code, mask=there)
        tl.store(errors + j * rows + row, error, mask=there)
        passed_on = tl.load(upper + at + channel, mask=inside & (channel > j), other=0)
        tile -= passed_on[:, None] * error[None, :]


def round_block(
    work: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_of: Tensor,
    codes: Tensor,
    start: int,
    stop: int,
    low: int,
    high: int,
) -> Tensor:
    """Round some input channels to a grid, each error fed to the channels after it within the block.

    Args:
        work: float32 [channels, rows], contiguous: weights that have absorbed the errors of the channels before.
        upper: float32 [channels, channels], contiguous: the upper Cholesky factor of the inverse Hessian.
        scale: float32 [groups, rows], contiguous.
        zero: zero-points, likewise.
        group_of: int32 [channels]: each channel's group.
        codes: float32 [channels, rows], contiguous; those of these channels are written.
        start: the first channel.
        stop: the first one after them.
        low: the smallest code.
        high: the largest code.

    Returns:
        float32 [stop - start, rows]: errors over the factor's diagonal, which later channels are still to absorb.

    Raises:
        ParetoError: shapes, strides, dtypes or devices do not fit.

    """
    numbers = (work, upper, scale, zero, codes)
    expect(
        "the kernel of GPTQ's loop",
        (
            (all(x.dtype == torch.float32 for x in numbers), "float32 weights, factor, scales, zero-points and codes"),
            (all(x.dim() == 2 and x.is_contiguous() for x in numbers), "contiguous matrices"),
            (codes.shape == work.shape, "codes of the weights' shape"),
            (tuple(upper.shape) == (len(work), len(work)), f"a factor [{len(work)}, {len(work)}]"),
            (scale.shape == zero.shape and scale.shape[1] == work.shape[1], "scales and zero-points [groups, rows]"),
            (is_vector(group_of, torch.int32) and len(group_of) == len(work), "an int32 group for each channel"),
            (0 <= start < stop <= len(work), f"channels within {len(work)}, not {start} to {stop}"),
            (all(x.device == work.device for x in (*numbers, group_of)), f"tensors on {work.device}"),
        ),
    )
    channels, rows = work.shape
    errors = torch.empty((stop - start, rows), dtype=torch.float32, device=work.device)
    block = max(triton.next_power_of_2(stop - start), 16)
    _round_block[(triton.cdiv(rows, ROWS),)](
        work, upper, scale, zero, group_of, codes, errors, rows, channels, start, float(low), float(high),
        WIDTH=stop - start, BLOCK=block, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return errors
