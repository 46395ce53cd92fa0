"""SparseGPT: prunes a weight one input channel at a time and lets the channels not yet pruned absorb the error.

Frantar, Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023),
https://arxiv.org/abs/2301.00774. Making the weight w_j of channel j zero, and the channels after it absorb that in the
best way, costs ``w_j^2 / [H^-1]_jj`` of ``||W X - Q X||^2`` (Eq. 3), H being the Hessian of the channels from j on;
with U the upper Cholesky factor of H^-1 that is ``(w_j / U_jj)^2``. So the loop is that of GPTQ (``feedback.py``),
and what is new is which weights it makes zero (section 3.3, Algorithm 1): those that cost least, of all weights in each
block of 128 channels, or all but N of each M neighbours (section 3.4), chosen when the block or the M neighbours are
reached, on weights that have absorbed the error so far.

With ``bits`` the same pass rounds the weights that stay (section 3.5): later channels absorb both errors at once. A
group's grid is fitted when its first channel is reached, on its weights with the zeros that they would have by then.
With ``refit`` too, that pass only chooses the zeros; what is left is then fitted to them and rounded in a second pass.

``upstream`` is as in ``gptq.py``: it goes beyond the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import Search
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.handlers import LinearProblem, prunes, register
from quant_methods.methods.feedback import Groups, Kept, Rounding, feed_back
from quant_methods.methods.gptq import (
    GPTQ,
    UPSTREAM_DAMPING,
    aim,
    check_dampings,
    factorize,
    finite,
    layer_of,
    solve,
)
from quant_methods.methods.pruning import least
from quant_methods.steps import PruneStep, Store

CHOSEN_TOGETHER = 128
"""The channels among whose weights those to prune are chosen, without a pattern: the paper's blocks."""
OF_ROUNDING = ("bits", "group_size", "symmetric", "search", "store", "targets")
"""The settings that what rounds in the same pass has too."""
NOT_ROUNDED = 16
"""What ``bits`` is where weights keep 16 bits."""


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(PruneStep):
    """SparseGPT.

    Attributes:
        damping: added to the Hessian's diagonal, as a fraction of its mean; 0.01 in the paper.
        upstream: make up for the error of the layers before.
        upstream_damping: see ``gptq.aim``.
        bits: of a code, 2 to 8, for what is left; ``NOT_ROUNDED``: it stays in 16 bits.
        group_size: see ``RoundStep``, as are those that follow; without ``bits`` they mean nothing.
        symmetric: without zero-points.
        search: how each group's range is chosen.
        store: whether zeros are stored; ``2:4``, as the pattern, and ``bitmap`` leave them out.

    """

    damping: float = 0.1
    upstream: bool = True
    upstream_damping: float = UPSTREAM_DAMPING
    bits: int = NOT_ROUNDED
    group_size: int = 128
    symmetric: bool = True
    search: Search = "mse"
    store: Store = "dense"

    @property
    def rounding(self) -> GPTQ | None:
        """What rounds in the same pass; None: nothing does."""
        if self.bits == NOT_ROUNDED:
            return None
        own: dict[str, Any] = {name: getattr(self, name) for name in OF_ROUNDING}
        return GPTQ(
            **own,
            act_order=False,
            damping=self.damping,
            upstream=self.upstream,
            upstream_damping=self.upstream_damping,
        )

    def check(self) -> None:
        """Refuse a damping that is no positive fraction, and what no prune step takes or no grid has."""
        super().check()
        if self.rounding is not None:
            self.rounding.check()
        elif self.store != "dense":
            raise ParetoError(
                f"sparsegpt: store: {self.store} is for weights that are rounded; give bits: 4, or store to the step "
                "that rounds after it"
            )
        check_dampings(self.damping, self.upstream_damping, "the paper's value is 0.01")


def prune_and_round(step: SparseGPT, rounding: GPTQ, problem: LinearProblem) -> QuantizedLinear:
    """Prune and round one layer in one pass; see ``handlers.Pruner``.

    Raises:
        ParetoError: the Hessian is not finite.

    """
    weight, hessian = _prepared(step, problem)
    order = torch.arange(weight.shape[1], device=weight.device)
    groups = Groups.unfitted(weight, rounding.grid, order, (hessian, rounding.search, problem.scale_dtype))
    choosing = Choosing(step, weight, finite(problem).diagonal() <= 0, groups)
    feed_back(weight, hessian, order, choosing)
    found = groups.result()
    if step.refit:
        # The zeros are known now, so that channels can come in any order.
        found = solve(
            weight,
            hessian,
            rounding.grid,
            act_order=True,
            search=rounding.search,
            scale_dtype=problem.scale_dtype,
            kept=choosing.kept.T,
        )
    return layer_of(*found, rounding, problem.scale_dtype)


@prunes(
    SparseGPT,
    needs_hessian=lambda step: True,
    needs_upstream=lambda step: step.upstream,
    and_round=prune_and_round,
)
def prune(step: SparseGPT, problem: LinearProblem) -> Tensor:
    """Prune one layer; see ``handlers.Pruner``.

    Raises:
        ParetoError: the Hessian is not finite.

    """
    weight, hessian = _prepared(step, problem)
    choosing = Choosing(step, weight, finite(problem).diagonal() <= 0, None)
    feed_back(weight, hessian, torch.arange(weight.shape[1], device=weight.device), choosing)
    assert choosing.weight is not None
    return choosing.weight.T.contiguous()


def _prepared(step: SparseGPT, problem: LinearProblem) -> tuple[Tensor, Tensor]:
    """Return the weight to solve for, and the damped Hessian."""
    return aim(problem, step.upstream_damping), factorize(finite(problem), step.damping)[0]


class Choosing(Kept):
    """Chooses which weights become zero when they are reached.

    Args:
        step: how many, and in which pattern.
        weight: [rows, columns], for its shape.
        dead: bool [columns], channels that calibration never excites: zeros there cost nothing.
        inner: see :class:`feedback.Kept`.

    """

    def __init__(self, step: SparseGPT, weight: Tensor, dead: Tensor, inner: Rounding | None) -> None:
        super().__init__(torch.ones_like(weight.T, dtype=torch.bool), weight.dtype, inner)
        self.step, self.dead = step, dead
        self.width = CHOSEN_TOGETHER if step.kept_among is None else step.kept_among[1]

    def sees(self, position: int) -> int:
        """Ask for the channels to choose among, and for what the inner rounding wants to see."""
        return max(self.width if position % self.width == 0 else 0, super().sees(position))

    def fit(self, position: int, current: Tensor, pivots: Tensor) -> None:
        """Choose. Channels that the inner rounding sees before their turn are chosen again then."""
        if position % self.width == 0:
            # A channel without inputs has a made-up entry in the damped Hessian.
            costs = (current / pivots[:, None]).square_()
            costs[self.dead[position : position + len(current)]] = 0
            self.kept[position : position + len(current)] = ~self._least(costs)
        if super().sees(position):
            super().fit(position, current, pivots)

    def _least(self, costs: Tensor) -> Tensor:
        """Return which weights [channels, rows] to make zero."""
        if self.step.kept_among is not None:
            return least(costs.T, self.step).T
        blocks = costs.split(self.width)
        return torch.cat([least(block.reshape(1, -1), self.step).view_as(block) for block in blocks])
