"""OWL: blocks with more outliers keep more of their weights.

Yin et al.: "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity" (2023),
https://arxiv.org/abs/2310.05175. With ``A_ij = ||X_j||_2 |W_ij|`` a block's ratio of outliers is the share of its
weights whose A is above M times the block's mean (section 3.2, Eq. 1). Sparsity falls with that ratio, and all layers
of a block have the same. As in the authors' code it falls linearly, from end to end by 2 lambda, and its mean over all
weights is what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.stages import Statistics, find_stages
from quant_methods.mixed_precision.budget import Assignment, Budget, assigned
from quant_methods.mixed_precision.sensitivity import statistics_of
from quant_methods.mixed_precision.units import Choice, Unit, Width, units_of, unmeasured
from quant_methods.plan import Plan
from quant_methods.steps import LEAST_SPARSITY, MOST_SPARSITY

OUTLIER = 5.0
"""M: how many times the mean an outlier is at least."""
SPREAD = 0.08
"""Lambda: how far a block's sparsity may be from the mean."""


def check_owl(plan: Plan, budget: Budget) -> None:
    """Refuse what OWL has no answer for.

    Raises:
        ParetoError: the budget is no share of zeros, one that leaves no room around it, or a step that fixes them.

    """
    least, most = LEAST_SPARSITY + 2 * SPREAD, MOST_SPARSITY - 2 * SPREAD
    if budget.sparsity is None or not least <= budget.sparsity <= most:
        raise ParetoError(
            f"budget {budget.text}: owl shares out a mean sparsity of {least:.0%} to {most:.0%}; give one, such as 50%"
        )
    for step in set(plan.prunes.values()):
        Width(16, percent=100 * budget.sparsity).prune(step)


def sparsities(ratios: Sequence[float], weights: Sequence[int], mean: float) -> list[float]:
    """Return each block's sparsity.

    Args:
        ratios: of outliers, one a block.
        weights: of each block; blocks of none do not count.
        mean: the fraction of all weights that is to be zero.

    """
    ratio, share = torch.tensor(ratios, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    share /= share.sum()
    own = ratio[share > 0]
    kept = (ratio - own.min()) / (own.max() - own.min()).clamp(min=1e-30) * 2 * SPREAD
    return (mean + (kept * share).sum() - kept).tolist()


@torch.no_grad()
def by_outliers(
    decoder: Decoder, plan: Plan, tokens: Tensor, budget: Budget, progress: Callable[[int, int, str], None]
) -> Assignment:
    """Return each unit's sparsity; its bits are those of its step.

    Args:
        decoder: the model.
        plan: which layers are pruned.
        tokens: int64 [sequences, length], calibration data.
        budget: the mean sparsity.
        progress: told (blocks done, blocks in all, what happens now).

    """
    assert budget.sparsity is not None
    total, seen = len(decoder.blocks), decoder.embed(tokens)
    found: list[tuple[float, int]] = []
    for index in range(total):
        progress(index, total, f"outliers of block {index + 1}/{total}")
        with decoder.loaded(index) as block:
            found.append(_outliers(decoder, plan, index, block, seen))
            if index < total - 1:
                decoder.advance(index, block, seen)
    ratios, weights = zip(*found, strict=True)
    units: list[Unit] = []
    losses: list[float] = []
    for index, sparsity in enumerate(sparsities(ratios, weights, budget.sparsity)):
        own = next((plan.steps[n].bits for n in plan.steps if n.startswith(decoder.name(index, ""))), 16)
        units += unmeasured(decoder, plan, index, (Width(own, percent=round(100 * sparsity, 2)),))
        losses += [ratios[index]] * (len(units) - len(losses))
    chosen: list[Choice] = [unit.choices[0] for unit in units]
    return assigned(units, chosen, losses, plan, decoder.source, "owl")


def _outliers(decoder: Decoder, plan: Plan, index: int, block: torch.nn.Module, seen: Tensor) -> tuple[float, int]:
    """Return a block's ratio of outliers among the weights that are pruned, and how many these are."""
    stages = find_stages(decoder, index, block, seen)
    known: dict[int, Statistics | None] = {}
    scores: list[Tensor] = []
    names = {name for family in units_of(decoder, plan, index) for name in family}
    for place, stage in enumerate(stages):
        for name in names.intersection(stage.names):
            if place not in known:
                known |= statistics_of(decoder, index, block, seen, stages, place)
            statistics = known[place]
            if statistics is not None:
                sizes = statistics.hessian.diagonal().clamp(min=0).sqrt()
                scores.append((block.get_submodule(name).weight.abs() * sizes).flatten())
    if not scores:
        return 0.0, 0
    both = torch.cat(scores)
    return (both > OUTLIER * both.mean()).double().mean().item(), len(both)
