"""SmoothQuant: moves the spread of activations' channels into the weights, so that both round well to 8 bits.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models" (2022), https://arxiv.org/abs/2211.10438. Inputs are divided and weights multiplied by
``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (Eq. 4), j an input channel. The paper has one alpha for a model;
without one each group of layers takes that of :data:`ALPHAS` that leaves the least error in its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.form import ACTIVATION_BITS
from quant_methods.formats.grid import nearest, round_static, round_tokens, static_scale
from quant_methods.handlers import ScalingProblem, register, transforms
from quant_methods.steps import ScaleStep

ALPHAS = tuple(i / 20 for i in range(21))


@register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(ScaleStep):
    """SmoothQuant.

    Attributes:
        alpha: how much of the activations' spread moves, 0 to 1; None searches one for each group of layers.

    """

    alpha: float | None = None

    def check(self) -> None:
        """Refuse an alpha out of range."""
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (number and 0 <= self.alpha <= 1):
            raise ParetoError(f"alpha: {self.alpha} is not in [0, 1]; the paper's value is 0.5, and null searches")


@transforms(SmoothQuant)
def scale(step: SmoothQuant, problem: ScalingProblem) -> Tensor:
    """Return the scales [in]; see ``handlers.ScalingProblem``."""
    if step.alpha is not None:
        return smooth(problem, step.alpha)
    targets = [problem.sample @ weight.T for weight in problem.weights]
    candidates = [torch.ones_like(problem.largest), *(smooth(problem, alpha) for alpha in ALPHAS)]
    return min(candidates, key=lambda s: _error(problem, s, targets))


def smooth(problem: ScalingProblem, alpha: float) -> Tensor:
    """Return Eq. 4's scales [in]; channels that are never used keep theirs."""
    weights = torch.stack([weight.abs().amax(0) for weight in problem.weights]).amax(0)
    used = (problem.largest > 0) & (weights > 0)
    s = problem.largest.clamp(min=1e-5).pow(alpha) / weights.clamp(min=1e-5).pow(1 - alpha)
    return torch.where(used, s, torch.ones_like(s))


def _error(problem: ScalingProblem, s: Tensor, targets: list[Tensor]) -> float:
    """Return the squared error of the layers' outputs on the sample, weights and activations rounded."""
    inputs, total = problem.sample / s, 0.0
    for weight, step, target in zip(problem.weights, problem.steps, targets, strict=True):
        if step is None:
            continue
        if step.static:
            rounded = round_static(inputs, static_scale(inputs, inputs.abs().max().item(), 8), inputs.new_zeros(1), 8)
        else:
            bits = ACTIVATION_BITS[step.activations]
            rounded = inputs if bits is None else round_tokens(inputs, bits)
        total += (rounded @ nearest(weight * s, step.grid).T - target).square().sum().item()
    return total
