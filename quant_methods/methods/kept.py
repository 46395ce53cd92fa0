"""Keeps the zeros of a model that was pruned before, by us or by somebody else, so that a rounding step keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.handlers import LinearProblem, prunes, register
from quant_methods.steps import PruneStep

WITHIN = 0.01
"""How far below ``sparsity`` the fraction of a layer's zeros may be: methods round it block by block."""


@register("keep-zeros")
@dataclass(frozen=True)
class KeepZeros(PruneStep):
    """No weight becomes zero that is not; a layer that lacks the zeros it should have is refused."""

    from_dense: ClassVar[bool] = False

    def check(self) -> None:
        """Refuse a fraction or pattern that is none, and a fit, which would change the weights for nothing."""
        super().check()
        if self.refit:
            raise ParetoError("keep-zeros: refit has nothing to fit to, as the dense weights are gone; leave it out")


@prunes(KeepZeros)
def unchanged(step: KeepZeros, problem: LinearProblem) -> Tensor:
    """Return a layer's weight as it is; see ``handlers.Pruner``.

    Raises:
        ParetoError: it has not the zeros that the step names.

    """
    zero = problem.weight == 0
    if step.kept_among is None:
        good, found = zero.float().mean().item() >= step.sparsity - WITHIN, f"{zero.float().mean().item():.1%} zeros"
    else:
        kept, among = step.kept_among
        most = int((~zero).unflatten(1, (-1, among)).sum(-1).max())
        good, found = most <= kept, f"{most} of {among} neighbours that are not zero"
    if not good:
        raise ParetoError(
            f"keep-zeros: {problem.name} has {found}, and the recipe says sparsity {step.sparsity:g}, pattern "
            f"{step.pattern}; prune the model first, or leave the layer out with ignore"
        )
    return problem.weight.clone()
