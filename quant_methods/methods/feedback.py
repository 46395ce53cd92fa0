"""GPTQ's loop over input channels, for whatever rounds them: to a grid, to tables, to zeros.

``feed_back`` is the loop of Algorithm 1 of the paper at the head of ``gptq.py``; what is done to a channel is a
:class:`Rounding`'s. ``kernels/feedback.py`` does a block of it in one launch on a GPU.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quant_methods.formats.grid import Grid, Search, fit, round_to_grid
from quant_methods.threads import few_threads

# Channels rounded between two updates of all later ones (Algorithm 1's B); changes speed, not the result.
BLOCK = 128


class Rounding(Protocol):
    """Rounds one input channel after the other."""

    def sees(self, position: int) -> int:
        """Return how many channels ``fit`` is to see before the one at this position of the order is rounded."""

    def fit(self, position: int, current: Tensor, pivots: Tensor) -> None:
        """See the next channels, fewer at the end.

        Args:
            position: of the first.
            current: [channels, rows], weights that have absorbed the error so far.
            pivots: [channels], of which the squares are [H^-1]_jj, H having lost the channels before j.

        """

    def round(self, position: int, channel: Tensor) -> Tensor:
        """Return what the weights [rows] of the channel at this position of the order will read back as."""

    def round_block(self, work: Tensor, upper: Tensor, start: int, stop: int) -> Tensor | None:
        """Round a block of channels at once and return their errors as ``feed_back`` keeps them; None: one by one."""


class Groups:
    """Rounds to a grid with a scale for each group, and keeps the codes [columns, rows] in the order of rounding.

    Args:
        grid: the grid.
        order: int64 [columns], the channels in the order of rounding.
        ranges: (scale, zero-point) [rows, groups].
        late: what ``fit`` takes to find them when a group is reached; None: they are given.

    """

    def __init__(
        self,
        grid: Grid,
        order: Tensor,
        ranges: tuple[Tensor, Tensor],
        late: tuple[Tensor, Search, torch.dtype] | None = None,
    ) -> None:
        self.grid, self.late, self.order = grid, late, order
        self.width = len(order) // grid.groups(len(order))
        self.groups = (order // self.width).int()
        self.group_of = self.groups.tolist()
        self.scale, self.zero = (part.T.contiguous() for part in ranges)
        self.codes = self.scale.new_empty((len(order), self.scale.shape[1]))

    @classmethod
    def unfitted(cls, weight: Tensor, grid: Grid, order: Tensor, late: tuple[Tensor, Search, torch.dtype]) -> Groups:
        """Return one for a weight [rows, columns] that fits each group's grid when its first channel is reached."""
        unknown = weight.new_zeros((len(weight), grid.groups(weight.shape[1])))
        return cls(grid, order, (unknown, unknown.clone()), late)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes [rows, columns], scales and zero-points [rows, groups], channels as in the weight."""
        codes = torch.empty_like(self.codes)
        codes[self.order] = self.codes
        return codes.T.contiguous(), self.scale.T.contiguous(), self.zero.T.contiguous()

    def sees(self, position: int) -> int:
        """Ask for a whole group at its first channel, if its grid is not given."""
        return self.width if self.late and position % self.width == 0 else 0

    def fit(self, position: int, current: Tensor, pivots: Tensor) -> None:
        """Fit a group's grid; see :class:`Rounding`."""
        assert self.late is not None
        hessian, search, scale_dtype = self.late
        grid, own = self.grid, slice(position, position + self.width)
        whole = Grid(grid.bits, -1, grid.symmetric, grid.per_tensor)
        scale, zero = fit(current.T, whole, hessian[own, own], search, scale_dtype)
        group = self.group_of[position]
        self.scale[group], self.zero[group] = scale[:, 0], zero[:, 0]

    def round(self, position: int, channel: Tensor) -> Tensor:
        """Round a channel; see :class:`Rounding`."""
        group = self.group_of[position]
        scale, zero = self.scale[group], self.zero[group]
        self.codes[position] = round_to_grid(channel, scale, zero, self.grid)
        return (self.codes[position] - zero) * scale

    def round_block(self, work: Tensor, upper: Tensor, start: int, stop: int) -> Tensor | None:
        """Round a block of channels on a GPU; see :class:`Rounding`."""
        if self.late or not work.is_cuda or work.dtype != torch.float32:
            return None
        # Triton comes with PyTorch for CUDA alone.
        from quant_methods.kernels.feedback import round_block

        grid = self.scale, self.zero, self.groups
        return round_block(work, upper, *grid, self.codes, start, stop, self.grid.low, self.grid.high)


class Kept:
    """Makes the weights zero that a mask leaves out, and has the others rounded by another rounding, or keeps them.

    Attributes:
        kept: bool [columns, rows], in the order of rounding.
        inner: rounds what is left; a zero has to read back as a zero. None: nothing is rounded.
        weight: [columns, rows], the weights with zeros; None where the inner rounding keeps the result.

    """

    def __init__(self, kept: Tensor, dtype: torch.dtype, inner: Rounding | None = None) -> None:
        self.kept, self.inner = kept, inner
        self.weight = torch.zeros(kept.shape, dtype=dtype, device=kept.device) if inner is None else None

    def sees(self, position: int) -> int:
        """Return what the inner rounding asks for."""
        return self.inner.sees(position) if self.inner is not None else 0

    def fit(self, position: int, current: Tensor, pivots: Tensor) -> None:
        """Show the inner rounding the weights as they will be, with zeros."""
        assert self.inner is not None
        current = current[: self.inner.sees(position)]
        mask = self.kept[position : position + len(current)]
        self.inner.fit(position, current * mask, pivots[: len(current)])

    def round(self, position: int, channel: Tensor) -> Tensor:
        """Return the channel with zeros; see :class:`Rounding`."""
        left = channel * self.kept[position]
        if self.inner is not None:
            return self.inner.round(position, left)
        assert self.weight is not None
        self.weight[position] = left
        return left

    def round_block(self, work: Tensor, upper: Tensor, start: int, stop: int) -> None:
        """Leave it to ``round``: no kernel has masks."""
        return


def feed_back(weight: Tensor, hessian: Tensor, order: Tensor, rounding: Rounding) -> None:
    """Round every channel in turn, and let the channels after it absorb its error: the loop of Algorithm 1.

    Args:
        weight: [rows, columns] float32 or float64; the arithmetic runs in this dtype.
        hessian: float64 [columns, columns], positive definite.
        order: int64 [columns], the channels in the order in which they are rounded.
        rounding: rounds them, and keeps the result.

    """
    columns = weight.shape[1]
    upper = inverse_factor(hessian, order).to(weight.dtype).contiguous()
    # Transposed, so that a channel is contiguous: the loop below touches one channel at a time.
    work = weight[:, order].T.contiguous()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        # Errors of this block's channels, not yet passed on to the channels from `stop` on.
        pending = rounding.round_block(work, upper, start, stop)
        if pending is None:
            # Factorizations and products keep all threads, channels one by one do not.
            with few_threads(work.shape[1]):
                pending = _one_by_one(work, upper, start, stop, rounding)
        work[stop:].addmm_(upper[start:stop, stop:].T, pending, alpha=-1)


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a Hessian whose channels are put in order."""
    # One expression a step: each of these is 1.6 GB for 14,336 channels.
    matrix = torch.linalg.cholesky(hessian[order[:, None], order])
    matrix = torch.cholesky_inverse(matrix)
    return torch.linalg.cholesky(matrix, upper=True)


def _one_by_one(work: Tensor, upper: Tensor, start: int, stop: int, rounding: Rounding) -> Tensor:
    """Round the channels of a block in turn, in place; return their errors [channels, rows]."""
    pending = work.new_zeros((stop - start, work.shape[1]))
    for j in range(start, stop):
        if seen := rounding.sees(j):
            current = work[j : j + seen]
            if j + seen > stop:
                late = current[stop - j :] - upper[start:j, stop : j + seen].T @ pending[: j - start]
                current = torch.cat([current[: stop - j], late])
            rounding.fit(j, current, upper.diagonal()[j : j + seen])
        error = (work[j] - rounding.round(j, work[j])) / upper[j, j]
        work[j:stop].addr_(upper[j, j:stop], error, alpha=-1)
        pending[j - start] = error
    return pending
