"""LLM.int8's outlier split: the few input channels with the largest activations keep 16 bits, all others are rounded.

Dettmers, Lewis, Belkada, Zettlemoyer: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (2022),
https://arxiv.org/abs/2208.07339, section 3.2, Eq. 8: ``X W = sum_{h in O} X_h W_h + s * sum_{h not in O} X_h W_h``, O
the channels in which an activation reaches a threshold, the second sum in integers. Here it goes around any weight step
(``outliers: 0.01``).

What differs from the paper:

- O is chosen once, on calibration data, not anew for every batch, so that serving need not look for it and the bulk can
  have fewer than 8 bits. All layers that share an input share it, since it follows from the input's statistics alone.
- Where the step looks at data, the kept channels K make up for the error of the rounded ones R. Minimizing
  ``||W X - Q X||^2`` over Q_K gives ``Q_K = W_K + (W_R - Q_R) H_RK H_KK^-1``, and leaves for Q_R the same problem with
  the Schur complement ``H_RR - H_RK H_KK^-1 H_KR`` for a Hessian: what GPTQ would do with the kept channels last.
- Kept weights may be rounded to 8 bits (``outlier_bits: 8``, one scale an output channel); their activations never are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.handlers import HANDLERS, LinearProblem
from quant_methods.methods.gptq import finite
from quant_methods.steps import RoundStep

# The paper's threshold on |x|, and what is added to the kept channels' Hessian, as a fraction of its diagonal.
THRESHOLD = 6.0
DAMPING = 1e-3


def choose(step: RoundStep, problem: LinearProblem) -> Tensor:
    """Return the channels to keep, int64 [k], rising.

    ``range`` takes the largest |x|, ``energy`` the largest mean x^2; ``threshold`` takes those whose |x| reaches 6.0,
    at most the fraction ``outliers``.
    """
    assert problem.largest is not None, "the calibrator supplies the sizes of the inputs"
    assert problem.hessian is not None
    score = problem.hessian.diagonal() if step.outlier_choice == "energy" else problem.largest
    count = max(1, round(step.outliers * len(score)))
    if step.outlier_choice == "threshold":
        count = min(count, int((score >= THRESHOLD).sum()))
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values


def split(
    step: RoundStep, problem: LinearProblem, solve: Callable[[Any, LinearProblem], QuantizedLinear]
) -> QuantizedLinear:
    """Keep channels of one layer apart, and let ``solve`` quantize the others; see ``handlers.LinearProblem``."""
    kept = choose(step, problem)
    if not len(kept):
        return solve(step, problem)
    weight = problem.weight
    rest = weight.clone()
    rest[:, kept] = 0
    given = dataclasses.replace(problem, weight=rest)
    if not HANDLERS[type(step)].needs_hessian(step):
        return solve(step, given).having(_columns(kept, weight[:, kept], step, problem.scale_dtype))
    hessian = finite(problem).double()
    shift = problem.residual.double() if problem.residual is not None else torch.zeros_like(weight, dtype=torch.float64)
    if problem.cross is not None:
        shift = shift + weight.double() @ problem.cross.double()
    # Outliers differ in size by orders of magnitude, so each is damped by its own; one never excited keeps its weights.
    among = hessian[kept][:, kept]
    among.diagonal().mul_(1 + DAMPING).masked_fill_(among.diagonal() <= 0, 1)
    factor = torch.linalg.cholesky(among)
    share = torch.cholesky_solve(hessian[kept], factor)  # H_KK^-1 H_K:, [k, in]
    schur = hessian - hessian[:, kept] @ share
    residual = shift - shift[:, kept] @ share
    for matrix in (schur.T, schur, residual.T):
        matrix[kept] = 0
    upstream = problem.cross is not None or problem.residual is not None
    linear = solve(
        step,
        dataclasses.replace(given, hessian=schur.float(), cross=None, residual=residual.float() if upstream else None),
    )
    apart = linear.having(Columns(kept.to(torch.int32), torch.zeros_like(weight[:, kept])))
    error = (weight - apart.read()).double()
    error[:, kept] = 0
    correction = torch.cholesky_solve((error @ hessian[:, kept] + shift[:, kept]).T, factor).T
    return linear.having(_columns(kept, weight[:, kept] + correction.to(weight.dtype), step, problem.scale_dtype))


def _columns(kept: Tensor, weight: Tensor, step: RoundStep, dtype: torch.dtype) -> Columns:
    """Return kept channels [out, k] as they are stored."""
    index = kept.to(torch.int32)
    if step.outlier_bits == 16:
        return Columns(index, weight.to(dtype))
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    codes = torch.round(weight / scale.to(weight.dtype)[:, None]).clamp(-127, 127)
    return Columns(index, codes.to(torch.int8), scale)
