"""Pruning that leaves the other weights as they are: by size, and by what each weight adds to the layer's output.

Magnitude pruning (Han, Pool, Tran, Dally: "Learning both Weights and Connections for Efficient Neural Networks", 2015,
https://arxiv.org/abs/1506.02626, section 3) makes the smallest weights zero. Wanda (Sun, Liu, Bair, Kolter: "A Simple
and Effective Pruning Approach for Large Language Models", 2023, https://arxiv.org/abs/2306.11695) makes those zero that
have the least ``|W_ij| * ||X_j||_2`` (Eq. 1), compared within each output channel (section 3).

A pruned weight is exactly zero, and nothing else tells it apart: a weight that was zero before counts as pruned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_methods.handlers import PRUNERS, LinearProblem, prunes, register
from quant_methods.methods.gptq import GPTQ, UPSTREAM_DAMPING, aim, factorize, finite
from quant_methods.methods.refit import refit
from quant_methods.steps import PruneStep

LONG = 1 << 15
"""Scores in a row from which a GPU sorts them: there ``kthvalue`` gives a row to a single block of threads."""


def pruned(step: PruneStep, problem: LinearProblem) -> Tensor:
    """Return a layer's weight as any prune step leaves it, what is left fitted if the step says so.

    Raises:
        ParetoError: the Hessian is not finite.

    """
    found = PRUNERS[type(step)].prune(step, problem)
    if not step.refit:
        return found
    hessian = factorize(finite(problem), getattr(step, "damping", GPTQ.damping))[0]
    target = aim(problem, getattr(step, "upstream_damping", UPSTREAM_DAMPING))
    return refit(target, found, found != 0, hessian)


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(PruneStep):
    """The smallest weights of a layer become zero: of the whole layer, or N of M neighbours in each output channel."""


@prunes(Magnitude)
def by_magnitude(step: Magnitude, problem: LinearProblem) -> Tensor:
    """Prune one layer; see ``handlers.Pruner``."""
    scores = problem.weight.abs()
    if step.kept_among is None:
        scores = scores.view(1, -1)
    return problem.weight.masked_fill(least(scores, step).view_as(problem.weight), 0)


def least(scores: Tensor, step: PruneStep, share: float = 1.0) -> Tensor:
    """Return which weights a step makes zero: those with the least scores, of equal ones the first.

    Args:
        scores: [rows, n] floating point; with a pattern N:M, M divides n.
        step: without a pattern it takes its share of each row's weights, rounded to a whole number; with N:M all but N
            of each M neighbours.
        share: of the weights that the step makes zero, what fraction; a whole number for each row or M neighbours.

    Returns:
        bool [rows, n].

    """
    if step.kept_among is None:
        return _least(scores, round(scores.shape[1] * step.sparsity * share))
    kept, among = step.kept_among
    return _least(scores.unflatten(1, (-1, among)), round((among - kept) * share)).flatten(1)


def _least(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` least scores along the last dimension, of equal ones the first."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.is_cuda and scores.shape[-1] > LONG:
        bound = scores.sort(-1).values[..., count - 1 : count]
    else:
        bound = scores.kthvalue(count, -1, keepdim=True).values
    below, tied = scores < bound, scores == bound
    return below | (tied & (tied.cumsum(-1, dtype=torch.int32) <= count - below.sum(-1, keepdim=True)))


@register("wanda")
@dataclass(frozen=True)
class Wanda(PruneStep):
    """The weights that add least to the output of their channel become zero, judged by size and input alone."""


@prunes(Wanda, needs_hessian=lambda step: True)
def by_wanda(step: Wanda, problem: LinearProblem) -> Tensor:
    """Prune one layer; see ``handlers.Pruner``.

    Raises:
        ParetoError: the Hessian is not finite.

    """
    # The mean of x^2 instead of its sum: within a row a common factor changes no comparison.
    sizes = finite(problem).diagonal().clamp(min=0).sqrt()
    return problem.weight.masked_fill(least(problem.weight.abs() * sizes.to(problem.weight.dtype), step), 0)
