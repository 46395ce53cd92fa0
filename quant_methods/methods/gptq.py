"""GPTQ: rounds a weight one input channel at a time and lets the channels not yet rounded absorb the error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), https://arxiv.org/abs/2210.17323. For inputs X it minimizes ``||W X - Q X||^2`` (Eq. 1). With
``H = X X^T`` and U the upper Cholesky factor of ``H^-1``, rounding channel j and adding
``-(w_j - q_j) / U_jj * U_j,j:`` to the channels after it is the optimal-brain-surgeon step (Eqs. 2 and 3) in the
numerically stable form of section 3.3, step 3; ``solve`` is its Algorithm 1.

Three choices go beyond the paper's algorithm:

- Activation order (the authors' ``--act-order``): channels with the largest ``H_jj`` first. Grids are fitted before
  the first rounding ("static groups"), so the layout stays that of ordinary groups and serving needs no permutation;
  vLLM 0.32 refuses checkpoints that need one (``g_idx``).
- Grids are fitted for the least error weighted by ``H_jj`` (``search: mse``), not to cover the largest weight.
- ``upstream: true`` aims at the original layer's output on the original model's inputs X_o instead of on the
  quantized model's inputs X: ``min_Q ||W X_o + R - Q X||^2``, R being what the residual stream has lost before the
  layer's output joins it. Completing the square gives ordinary GPTQ on the shifted weight
  ``W + (W (X_o - X) + R) X^T H^-1``. Li et al., "GPTAQ" (2025), https://arxiv.org/abs/2504.02692, Eq. 5, pose this
  objective without R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import Grid, Search, fit, round_to_grid
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import DenseLinear, QuantizedLinear
from quant_methods.handlers import LinearProblem, handles, register
from quant_methods.steps import RoundStep
from quant_methods.symmetric import mean_square
from quant_methods.threads import few_threads

# Channels rounded between two updates of all later ones (Algorithm 1's B); changes speed, not the result.
BLOCK = 128
UPSTREAM_DAMPING = 1.0
PAPERS_DAMPING = 0.01
"""What the paper and other tools take by default; ten times as much suits a pretrained model of few tokens better."""


@register("gptq")
@dataclass(frozen=True)
class GPTQ(RoundStep):
    """GPTQ.

    Attributes:
        act_order: round the channels with the largest activations first.
        search: how each group's range is chosen, ``minmax``, ``mse`` or ``output``.
        damping: added to the Hessian's diagonal, as a fraction of its mean; PAPERS_DAMPING in the paper.
        upstream: make up for the error of the layers before.
        upstream_damping: see :func:`aim`.

    """

    act_order: bool = True
    search: Search = "mse"
    damping: float = 0.1
    upstream: bool = True
    upstream_damping: float = UPSTREAM_DAMPING

    def check(self) -> None:
        """Refuse a damping that is no positive fraction, and what vLLM cannot serve."""
        super().check()
        if not 0 < self.damping <= 1:
            raise ParetoError(f"damping: {self.damping} is not in (0, 1]; the paper's value is 0.01")
        check_upstream_damping(self.upstream_damping)


@handles(GPTQ, needs_hessian=lambda step: True, needs_upstream=lambda step: step.upstream)
def quantize(step: GPTQ, problem: LinearProblem) -> QuantizedLinear:
    """Quantize one layer; see ``handlers.LinearProblem``.

    Raises:
        ParetoError: the Hessian is not finite.

    """
    # One after the other: of a wide layer's Hessian each copy is gigabytes.
    weight = aim(problem, step.upstream_damping)
    hessian = factorize(finite(problem), step.damping)[0]
    codes, scale, zero = solve(
        weight,
        hessian,
        step.grid,
        act_order=step.act_order,
        search=step.search,
        scale_dtype=problem.scale_dtype,
        ranges=problem.ranges,
    )
    scale, zero = scale.to(problem.scale_dtype), zero.to(torch.int8)
    return QuantizedLinear(GridCodes(codes.to(torch.int8), scale, zero, step.bits, step.symmetric))


def finite(problem: LinearProblem) -> Tensor:
    """Return a problem's Hessian.

    Raises:
        ParetoError: it is not finite.

    """
    assert problem.hessian is not None, "the calibrator supplies a Hessian to every step that needs it"
    if not torch.isfinite(problem.hessian).all():
        raise ParetoError(f"{problem.name}: the calibration activations are not finite (inf or NaN)")
    return problem.hessian


def check_upstream_damping(damping: float) -> None:
    """Refuse a damping that is no sensible fraction."""
    if not 0 < damping <= 100:
        raise ParetoError(f"upstream_damping: {damping} is not in (0, 100]; {UPSTREAM_DAMPING:g} is good")


def aim(problem: LinearProblem, damping: float = UPSTREAM_DAMPING) -> Tensor:
    """Return the weight float32 [out, in] to solve for: shifted as ``upstream`` says if the problem has its statistics.

    Args:
        problem: the layer.
        damping: added to the Hessian's diagonal, as a fraction of its mean. The shift is a regression on the
            calibration data: little of it is fitted too closely with as little damping as rounding needs.

    """
    shift: Tensor | None = None
    if problem.cross is not None:
        shift = problem.weight.double() @ problem.cross.double()
    if problem.residual is not None:
        shift = problem.residual.double() if shift is None else shift + problem.residual.double()
    if shift is None:
        return problem.weight
    factor = factorize(finite(problem), damping)[1]
    return problem.weight + torch.cholesky_solve(shift.T, factor).T.to(problem.weight.dtype)


def factorize(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Damp a Hessian until it has a Cholesky factor.

    A channel that calibration never excites has a zero row and column; its diagonal becomes 1, which rounds it to
    nearest and leaves the others alone.

    Args:
        hessian: [n, n] symmetric positive semidefinite, any floating dtype.
        damping: fraction of the mean diagonal that is added to the diagonal; ten times more after each failure.

    Returns:
        (damped Hessian, its lower Cholesky factor), float64 [n, n].

    Raises:
        ParetoError: no damping up to 10^6 times the mean diagonal helps, so the matrix is not finite.

    """
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal <= 0] = 1
    mean = diagonal.mean().item()
    added = 0.0
    while damping <= 1e6:
        diagonal += damping * mean - added
        added = damping * mean
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item() and torch.isfinite(factor).all():
            return damped, factor
        damping *= 10
    raise ParetoError("the Hessian of the calibration activations is not finite (inf or NaN)")


def solve(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    act_order: bool = True,
    search: Search = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run GPTQ's Algorithm 1.

    Without activation order a group's grid is fitted when its first channel is reached, on weights that have absorbed
    the error so far (section 3.3, "additional grouping"); with it, all grids are fitted at the start.

    Args:
        weight: [rows, columns] float32 or float64; the arithmetic runs in this dtype.
        hessian: float64 [columns, columns], damped so that it is positive definite.
        grid: the grid.
        act_order: round channels in order of falling ``hessian`` diagonal (ties: lower index first).
        search: how ranges are chosen.
        scale_dtype: dtype that scales are stored in.
        ranges: (scale, zero-point) [rows, groups], given beforehand.

    Returns:
        (codes [rows, columns], scale [rows, groups], zero_point [rows, groups]) in ``weight``'s dtype.

    """
    columns, groups = weight.shape[1], grid.groups(weight.shape[1])
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        ranges = ranges or fit(weight, grid, hessian, search, scale_dtype)
    else:
        order = torch.arange(columns, device=weight.device)
    if ranges is not None:
        rounding = _Groups(grid, columns // groups, order, ranges)
    else:
        unknown = weight.new_zeros((len(weight), groups)), weight.new_zeros((len(weight), groups))
        rounding = _Groups(grid, columns // groups, order, unknown, (hessian, search, scale_dtype))
    feed_back(weight, hessian, order, rounding)
    codes = torch.empty_like(rounding.codes)
    codes[order] = rounding.codes
    return codes.T.contiguous(), rounding.scale.T.contiguous(), rounding.zero.T.contiguous()


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


class _Groups:
    """Rounds to a grid with a scale for each group, and keeps the codes [columns, rows] in the order of rounding."""

    def __init__(
        self,
        grid: Grid,
        width: int,
        order: Tensor,
        ranges: tuple[Tensor, Tensor],
        late: tuple[Tensor, Search, torch.dtype] | None = None,
    ) -> None:
        self.grid, self.late = grid, late
        self.width = width
        self.groups = (order // width).int()
        self.group_of = self.groups.tolist()
        self.scale, self.zero = (part.T.contiguous() for part in ranges)
        self.codes = self.scale.new_empty((len(order), self.scale.shape[1]))

    def sees(self, position: int) -> int:
        return self.width if self.late and position % self.width == 0 else 0

    def fit(self, position: int, current: Tensor, pivots: Tensor) -> None:
        assert self.late is not None
        hessian, search, scale_dtype = self.late
        grid, own = self.grid, slice(position, position + self.width)
        whole = Grid(grid.bits, -1, grid.symmetric, grid.per_tensor)
        scale, zero = fit(current.T, whole, hessian[own, own], search, scale_dtype)
        group = self.group_of[position]
        self.scale[group], self.zero[group] = scale[:, 0], zero[:, 0]

    def round(self, position: int, channel: Tensor) -> Tensor:
        group = self.group_of[position]
        scale, zero = self.scale[group], self.zero[group]
        self.codes[position] = round_to_grid(channel, scale, zero, self.grid)
        return (self.codes[position] - zero) * scale

    def round_block(self, work: Tensor, upper: Tensor, start: int, stop: int) -> Tensor | None:
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
        weight: [columns, rows], what the weights read back as.

    """

    def __init__(self, kept: Tensor, dtype: torch.dtype, inner: Rounding | None = None) -> None:
        self.kept, self.inner = kept, inner
        self.weight = torch.zeros(kept.shape, dtype=dtype, device=kept.device)

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
        self.weight[position] = left if self.inner is None else self.inner.round(position, left)
        return self.weight[position]

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
    upper = _upper(hessian, order).to(weight.dtype).contiguous()
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


def _upper(hessian: Tensor, order: Tensor) -> Tensor:
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


def relative_error(weight: Tensor, quantized: QuantizedLinear | DenseLinear, hessian: Tensor | None) -> float:
    """Return ``||W X - Q X|| / ||W X||`` over the calibration inputs, or ``||W - Q|| / ||W||`` without a Hessian.

    Args:
        weight: float32 [out, in], the original.
        quantized: what a step made of it.
        hessian: float32 [in, in] or None.

    """
    error = quantized.read() - weight

    def norm(matrix: Tensor) -> float:
        square = (
            mean_square(matrix, hessian) if hessian is not None else matrix.square().sum(dtype=torch.float64).item()
        )
        return math.sqrt(square)

    return norm(error) / max(norm(weight), 1e-30)
