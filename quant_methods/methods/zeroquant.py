"""ZeroQuant-V2's low-rank compensation: a small product in 16 bits makes up for what rounding does to a weight.

Yao, Wu, Li, Youn, He: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank
Compensation" (2023), https://arxiv.org/abs/2303.08302, section 5: with the error ``E = W - Q = U S V``, the rank-m
product of ``U_m S_m^1/2`` and ``S_m^1/2 V_m`` is added to Q. It goes around any weight step (``rank: 8``). The paper's
other ingredients are settings of a weight step: groups of weights, and 8-bit activations per token
(``activations: int8``).

The paper's decomposition finds the least ``||E - L||^2`` (``rank_metric: weights``). ``rank_metric: activations``
differs: it finds the least error of the layer's output, ``||(E - L) X||^2``, from the decomposition of ``E C`` with
``H = C C^T``, as ``L = (E C)_m C^-1`` (Saha et al., "Compressing Large Language Models using Low Rank and Low Precision
Decomposition", 2024, https://arxiv.org/abs/2405.18886, section 4, have the like). After a prune step E is what pruning
and rounding took together: EoRA (Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace
Low-Rank Approximation", 2024, https://arxiv.org/abs/2410.21271) projects with the eigenvectors of H where this takes C,
which finds the same product, since ``||M C|| = ||M H^1/2||``. SLiM (Mozaffari et al., 2024,
https://arxiv.org/abs/2410.09615) weighs with the mean size of each input alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.handlers import LinearProblem
from quant_methods.methods.gptq import UPSTREAM_DAMPING, aim, factorize
from quant_methods.steps import RoundStep

# Added to the Hessian's diagonal, as a fraction of its mean.
DAMPING = 0.01
# Of the randomized decomposition (Halko, Martinsson, Tropp, 2011). Rounding's errors have flat spectra: they want many.
OVERSAMPLING, ITERATIONS = 16, 8


def compensate(
    step: RoundStep, problem: LinearProblem, solve: Callable[[Any, LinearProblem], QuantizedLinear]
) -> QuantizedLinear:
    """Let ``solve`` quantize one layer, and add what makes up for its error; see ``handlers.LinearProblem``."""
    # Of a pruned layer the error is all that pruning and rounding took.
    whole = problem.weight if problem.dense is None else problem.dense
    if problem.hessian is not None:
        # The error is what is missing from the weight that the step really aims at.
        given = dataclasses.replace(problem, weight=whole)
        whole = aim(given, getattr(step, "upstream_damping", UPSTREAM_DAMPING))
        problem = dataclasses.replace(problem, cross=None, residual=None)
    if problem.dense is None:
        problem = dataclasses.replace(problem, weight=whole)
    else:
        problem = dataclasses.replace(problem, dense=whole)
    target = whole.clone()
    linear = solve(step, problem)
    metric: Tensor | None = None
    if problem.hessian is not None and step.rank_metric == "activations":
        metric = factorize(problem.hessian, DAMPING)[1]
    return linear.having(low_rank(target - linear.read(), metric, step.rank, problem.scale_dtype))


def low_rank(error: Tensor, factor: Tensor | None, rank: int, dtype: torch.dtype) -> LowRank:
    """Return the product of a rank that is nearest to a matrix.

    Args:
        error: [out, in] floating point.
        factor: float64 [in, in], lower triangular, C: the distance is ``||(error - product) C||``; None: no metric.
        rank: of the product.
        dtype: dtype that it is stored in.

    """
    matrix = error.double() if factor is None else error.double() @ factor
    # A whole decomposition takes minutes for a layer of a large model; the first few directions take a few products.
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(matrix, min(rank + OVERSAMPLING, *matrix.shape), niter=ITERATIONS)
    root = sizes[:rank].sqrt()
    down = root[:, None] * right[:, :rank].T
    if factor is not None:
        down = torch.linalg.solve_triangular(factor, down, upper=False, left=False)
    return LowRank((left[:, :rank] * root).to(dtype), down.to(dtype))
