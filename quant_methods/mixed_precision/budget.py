"""Mixed precision: finds the width of every layer that loses least under a budget of storage.

What each unit of layers loses at each width is measured (``sensitivity.py``), and losses are taken to add up: rounding
errors of different layers are nearly independent, and the divergence is quadratic in them. The assignment is then a
multiple-choice knapsack, solved exactly (``knapsack.py``), as HAWQ-V3 does by integer programming (Yao et al. 2021,
https://arxiv.org/abs/2011.10680, section 3.4). The result is an ordinary recipe: one weight step for each width, with
the layers' names as targets.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.fused import experts_of
from quant_methods.mixed_precision.knapsack import solve
from quant_methods.mixed_precision.units import Choice, Unit, Width
from quant_methods.plan import Plan
from quant_methods.recipe import Recipe
from quant_methods.steps import KINDS, PruneStep, RoundStep, Step

Loss = Literal["kl", "hessian", "owl"]
_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """What a checkpoint may take.

    Attributes:
        text: as the user wrote it.
        bits: mean bits a weight of the linear layers inside blocks, scales and zero-points included; or None.
        size: bytes of all tensors of the checkpoint; or None.
        sparsity: the fraction of zeros among the weights of the layers that the recipe prunes; or None.

    """

    text: str
    bits: float | None = None
    size: int | None = None
    sparsity: float | None = None

    @staticmethod
    def parse(text: str) -> Budget:
        """Return the budget that ``4.25bits``, ``3.9GB`` or ``3.9GiB`` means, or ``50%``: that many zeros.

        Raises:
            ParetoError: it means none.

        """
        match = re.fullmatch(r"([0-9]*\.?[0-9]+) ?(bits?|[MG]i?B|%)", text.strip(), re.IGNORECASE)
        if not match or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) >= 100):
            raise ParetoError(
                f"budget {text!r}: expected bits a weight, a size, or a share of zeros below 100%, such as 4.25bits, "
                "3.9GB, 3.6GiB or 50%"
            )
        value, unit = float(match[1]), match[2].upper()
        if unit == "%":
            return Budget(text.strip(), sparsity=value / 100)
        if unit.startswith("BIT"):
            return Budget(text.strip(), bits=value)
        return Budget(text.strip(), size=int(value * _UNITS[unit]))


@dataclass(frozen=True)
class Assignment:
    """The chosen width of every unit.

    Attributes:
        units: all units, in model order.
        chosen: each one's choice.
        losses: what each choice is expected to lose.
        bits_per_weight: of the linear layers inside blocks, those left alone included.
        size: bytes of the checkpoint's tensors.
        loss: what losses are in: ``kl`` (nats a token) or ``hessian`` (relative output error, squared); ``owl``: they
            are shares of outliers (``owl.py``).

    """

    units: list[Unit]
    chosen: list[Choice]
    losses: list[float]
    bits_per_weight: float
    size: int
    loss: Loss

    def counts(self) -> dict[str, int]:
        """Return how many units got each width, narrow ones first."""
        found = Counter(choice.width for choice in self.chosen)
        return {width: found[width] for width in sorted(found, key=lambda text: Width.parse(text).rank)}

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among all units' weights."""
        zeros = sum(_zeros(unit, choice) for unit, choice in zip(self.units, self.chosen, strict=True))
        return zeros / sum(unit.weights for unit in self.units)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        units = []
        for unit, choice, loss in zip(self.units, self.chosen, self.losses, strict=True):
            units.append({**dataclasses.asdict(unit), "chosen": choice.width, "loss": loss})
        return {
            "loss": self.loss,
            "predicted_loss": sum(self.losses),
            "bits_per_weight": self.bits_per_weight,
            "sparsity": self.sparsity,
            "checkpoint_bytes": self.size,
            "units": units,
        }


def assign(units: list[Unit], plan: Plan, source: Source, budget: Budget, loss: Loss = "kl") -> Assignment:
    """Choose every unit's width.

    Args:
        units: with their measures.
        plan: of the recipe; says which linear layers of the blocks are left alone.
        source: the model's checkpoint.
        budget: the limit.
        loss: which measure to add up.

    Raises:
        ParetoError: the budget is too small for the narrowest widths, or so large that nothing would be compressed.

    """
    if budget.sparsity is not None:
        table = [[_loss(choice, loss) for choice in unit.choices] for unit in units]
        kept = [[unit.weights - _zeros(unit, choice) for choice in unit.choices] for unit in units]
        limit = sum(unit.weights - round(unit.weights * budget.sparsity) for unit in units)
        if sum(map(min, kept)) > limit:
            raise ParetoError(
                f"budget {budget.text} asks for more zeros than the widths have; lower it, or allow more with --widths"
            )
        picks = solve(kept, table, limit)
        losses = [row[pick] for row, pick in zip(table, picks, strict=True)]
        chosen = [unit.choices[pick] for unit, pick in zip(units, picks, strict=True)]
        return assigned(units, chosen, losses, plan, source, loss)
    sparse = any(Width.parse(choice.width).percent for unit in units for choice in unit.choices)
    if budget.size is not None and sparse:
        raise ParetoError(
            f"budget {budget.text}: zeros are stored like other weights, so that they save no bytes; give the bits a "
            "weight that their places would take, such as 3.25bits, or a share of zeros, such as 50%"
        )
    weights, fixed = _fixed_bits(units, plan, source)
    whole = 8 * sum(source.size_of(f"{layer}.weight") for unit in units for layer in unit.layers)
    # A rotated model's head is a tensor that its files need not have.
    other = 8 * sum(map(source.size_of, source.entries)) - whole
    if budget.size is not None:
        # Beside codes, scales and zero-points a layer's tensors hold its shape, and zero-points end at a whole int32.
        spare = sum(8 * 32 * len(unit.layers) for unit in units)
        capacity, counted = 8 * budget.size - other - spare, "bytes"
    else:
        assert budget.bits is not None
        capacity, counted = int(budget.bits * weights) - fixed, "bits"
    sizes = [[choice.stored for choice in unit.choices] for unit in units]
    least = sum(map(min, sizes))
    if least > capacity:
        smallest = f"{(least + fixed) / weights:.3f}bits"
        if counted == "bytes":
            smallest = f"{(least + other + spare) / 8e9:.4f}GB"
        raise ParetoError(
            f"budget {budget.text} is less than the narrowest widths take ({smallest}); raise it, or allow narrower "
            "ones with --widths"
        )
    if capacity >= whole:
        raise ParetoError(f"budget {budget.text} leaves every layer at 16 bits: nothing to compress; lower it")
    table = [[_loss(choice, loss) for choice in unit.choices] for unit in units]
    picks = solve(sizes, table, capacity)
    chosen = [unit.choices[pick] for unit, pick in zip(units, picks, strict=True)]
    losses = [row[pick] for row, pick in zip(table, picks, strict=True)]
    return assigned(units, chosen, losses, plan, source, loss)


def assigned(
    units: list[Unit], chosen: list[Choice], losses: list[float], plan: Plan, source: Source, loss: Loss
) -> Assignment:
    """Return an assignment, with what it takes."""
    weights, fixed = _fixed_bits(units, plan, source)
    stored = sum(choice.stored for choice in chosen)
    whole = sum(source.size_of(f"{layer}.weight") for unit in units for layer in unit.layers)
    other = sum(map(source.size_of, source.entries)) - whole
    return Assignment(units, chosen, losses, (stored + fixed) / weights, stored // 8 + other, loss)


def _zeros(unit: Unit, choice: Choice) -> int:
    """Return how many zeros a unit has by a choice."""
    return Width.parse(choice.width).zeros(unit.weights)


def _fixed_bits(units: list[Unit], plan: Plan, source: Source) -> tuple[int, int]:
    """Return the weights of all linear layers inside blocks, and the bits of those that are left alone."""
    weights, fixed = sum(unit.weights for unit in units), 0
    for name in set(plan.ignored_inside) - plan.changed:
        fixed += 8 * source.size_of(f"{name}.weight")
        weights += math.prod(source.entries[f"{name}.weight"][1]["shape"])
    return weights, fixed


def _loss(choice: Choice, loss: Loss) -> float:
    if loss == "hessian":
        return choice.error
    if choice.kl is None:
        raise ParetoError("the sensitivities hold no KL divergence; choose by --sensitivity hessian, or measure again")
    return choice.kl


def mixed_recipe(recipe: Recipe, plan: Plan, assignment: Assignment, budget: Budget) -> Recipe:
    """Return the recipe that stores every unit as it was assigned.

    Args:
        recipe: what was budgeted.
        plan: its plan: which step each layer has.
        assignment: the widths.
        budget: for the description.

    """
    targets: dict[tuple[RoundStep, Width], list[str]] = {}
    prunes: dict[tuple[PruneStep, Width], list[str]] = {}
    alone: list[str] = []
    for unit, choice in zip(assignment.units, assignment.chosen, strict=True):
        # One glob for all experts of a block, which are thousands of layers in all.
        experts = experts_of(unit.layers)
        names = list(unit.layers) if experts is None else [experts]
        width = Width.parse(choice.width)
        if width.whole:
            alone += names
        if width.bits != 16:
            own = dataclasses.replace(width, percent=0)
            targets.setdefault((plan.steps[unit.layers[0]], own), []).extend(names)
        if width.percent:
            own = Width(16, percent=width.percent)
            prunes.setdefault((plan.prunes[unit.layers[0]], own), []).extend(names)
    changing: list[Step] = [
        *(dataclasses.replace(width.prune(step), targets=tuple(names)) for (step, width), names in prunes.items()),
        *(dataclasses.replace(width.step(step), targets=tuple(names)) for (step, width), names in targets.items()),
    ]
    # Other steps keep their place before and after those that prune and round.
    place = next(i for i, step in enumerate(recipe.steps) if isinstance(step, PruneStep | RoundStep))
    others = [
        [s for s in part if not isinstance(s, PruneStep | RoundStep)]
        for part in (recipe.steps[:place], recipe.steps[place:])
    ]
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-{budget.text.replace(' ', '')}",
        description=f"{recipe.name}, widths chosen for {budget.text}",
        # What trains between them keeps its place by its kind.
        steps=tuple(sorted((*others[0], *changing, *others[1]), key=lambda step: KINDS.index(step.kind))),
        ignore=(*recipe.ignore, *alone),
    )
