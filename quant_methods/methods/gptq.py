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

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import Grid, Search, fit
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import DenseLinear, QuantizedLinear
from quant_methods.handlers import LinearProblem, handles, register
from quant_methods.methods.feedback import Groups, Kept, feed_back
from quant_methods.methods.refit import refit
from quant_methods.steps import RoundStep
from quant_methods.symmetric import mean_square

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
        check_dampings(self.damping, self.upstream_damping, "the paper's value is 0.01")


@handles(GPTQ, needs_hessian=lambda step: True, needs_upstream=lambda step: step.upstream)
def quantize(step: GPTQ, problem: LinearProblem) -> QuantizedLinear:
    """Quantize one layer; see ``handlers.LinearProblem``.

    Raises:
        ParetoError: the Hessian is not finite.

    """
    # A pruned layer is to put out what it did before: rounding makes up for the zeros too.
    given = problem if problem.dense is None else dataclasses.replace(problem, weight=problem.dense)
    # One after the other: of a wide layer's Hessian each copy is gigabytes.
    weight = aim(given, step.upstream_damping)
    hessian = factorize(finite(problem), step.damping)[0]
    codes, scale, zero = solve(
        weight,
        hessian,
        step.grid,
        act_order=step.act_order,
        search=step.search,
        scale_dtype=problem.scale_dtype,
        ranges=problem.ranges,
        kept=problem.kept,
    )
    return layer_of(codes, scale, zero, step, problem.scale_dtype)


def layer_of(codes: Tensor, scale: Tensor, zero: Tensor, step: RoundStep, scale_dtype: torch.dtype) -> QuantizedLinear:
    """Return what :func:`solve` found as it is stored."""
    scale, zero = scale.to(scale_dtype), zero.to(torch.int8)
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


def check_dampings(damping: float, upstream_damping: float, usual: str) -> None:
    """Refuse dampings that are no sensible fractions; ``usual`` says what a good one is.

    Raises:
        ParetoError: one of them is not.

    """
    if not 0 < damping <= 1:
        raise ParetoError(f"damping: {damping} is not in (0, 1]; {usual}")
    if not 0 < upstream_damping <= 100:
        raise ParetoError(f"upstream_damping: {upstream_damping} is not in (0, 100]; {UPSTREAM_DAMPING:g} is good")


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
    kept: Tensor | None = None,
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
        kept: bool [rows, columns], the weights that are not to become zero; None: none is.

    Returns:
        (codes [rows, columns], scale [rows, groups], zero_point [rows, groups]) in ``weight``'s dtype.

    """
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    else:
        order = torch.arange(weight.shape[1], device=weight.device)
    if kept is not None:
        # Of what codes on the support lose, the distance to the best weights there is all that they can help.
        weight = refit(weight, weight * kept, kept, hessian)
    if act_order:
        ranges = ranges or fit(weight, grid, hessian, search, scale_dtype)
    if ranges is not None:
        rounding = Groups(grid, order, ranges)
    else:
        rounding = Groups.unfitted(weight, grid, order, (hessian, search, scale_dtype))
    feed_back(weight, hessian, order, rounding if kept is None else Kept(kept.T[order], weight.dtype, rounding))
    return rounding.result()


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
