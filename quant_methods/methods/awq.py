"""AWQ: gives the input channels that matter a finer grid, by scaling them up in the weights and down in the inputs.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: "AWQ: Activation-aware Weight Quantization for LLM Compression
and Acceleration" (2023), https://arxiv.org/abs/2306.00978. Scales are ``s = mean|X|^alpha`` with the alpha in [0, 1]
that leaves the least output error ``||Q(W diag(s)) diag(s)^-1 X - W X||^2`` (Eqs. 4 and 5). The error is taken with the
mean of x x^T, hence over all of the calibration set at the price of one product. As in the authors' later code, scales
``mean|X|^alpha / mean|W|^(1 - alpha)`` are tried too, W relative to its group's largest.

Clipping, the method's other half, is the weight step's ``search: output``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import nearest
from quant_methods.handlers import ScalingProblem, register, transforms
from quant_methods.steps import RoundStep, ScaleStep
from quant_methods.symmetric import mean_square


@register("awq")
@dataclass(frozen=True)
class AWQ(ScaleStep):
    """AWQ's scales.

    Attributes:
        exponents: how many are tried between 0 and 1.

    """

    exponents: int = 20

    def check(self) -> None:
        """Refuse a search without candidates."""
        if self.exponents < 1:
            raise ParetoError(f"exponents: {self.exponents} to try; use at least 1 (the paper tries 20)")


@transforms(AWQ)
def scale(step: AWQ, problem: ScalingProblem) -> Tensor:
    """Return the scales [in]; see ``handlers.ScalingProblem``."""
    best = torch.ones_like(problem.mean)
    pairs = [(w, s) for w, s in zip(problem.weights, problem.steps, strict=True) if s is not None]
    if not pairs:
        return best
    importance = _relative_size(pairs)
    least = _error(problem.hessian, pairs, best)
    for exponent in range(1, step.exponents + 1):
        alpha = exponent / step.exponents
        inputs = problem.mean.clamp(min=1e-8).pow(alpha)
        for raw in (inputs, inputs / importance.clamp(min=1e-4).pow(1 - alpha)):
            used = torch.where(problem.mean > 0, raw, torch.ones_like(raw)).clamp(min=1e-4)
            s = used / (used.max() * used.min()).sqrt()
            error = _error(problem.hessian, pairs, s)
            if error < least:
                best, least = s, error
    return best


def _relative_size(pairs: list[tuple[Tensor, RoundStep]]) -> Tensor:
    """Return each input channel's mean |w| [in], every weight relative to the largest of its group."""
    total, rows = torch.zeros_like(pairs[0][0][0]), 0
    for weight, step in pairs:
        columns = weight.shape[1]
        grouped = weight.abs().unflatten(1, (step.grid.groups(columns), -1))
        total += (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).sum(0)
        rows += len(weight)
    return total / rows


def _error(hessian: Tensor, pairs: list[tuple[Tensor, RoundStep]], s: Tensor) -> float:
    """Return the mean squared error of the layers' outputs, summed over outputs."""
    total = 0.0
    for weight, step in pairs:
        error = nearest(weight * s, step.grid) / s - weight
        total += mean_square(error, hessian)
    return total
