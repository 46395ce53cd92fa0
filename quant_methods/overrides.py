"""Settings that change a recipe: what the flags of ``pareto compress`` and the points of a sweep have in common."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from kv_cache.errors import ParetoError
from quant_methods.exempt import check
from quant_methods.recipe import Calibration, Recipe
from quant_methods.recipe_file import checked
from quant_methods.steps import RoundStep, Step

# Settings of steps: changed in every step of the recipe that has them.
OF_STEPS = (
    "bits", "group_size", "group_size_fallback", "per_tensor", "symmetric", "activations", "search", "act_order",
    "damping", "upstream", "upstream_damping", "alpha", "outliers", "rank", "sparse", "epochs", "sparsity", "pattern",
    "refit", "store", "train_steps", "lora", "loss", "learning_rate",
)  # fmt: skip
# Of these, what says how weights are rounded.
OF_ROUNDING = ("bits", "group_size", "symmetric", "search", "store")
# Settings of the calibration, and their names there.
OF_CALIBRATION = {"num_calibration_samples": "num_samples", "calibration_length": "length", "seed": "seed"}
OF_RECIPES = ("ignore", "exempt", "kv_scales")
# Settings of the steps that train a whole model, and their names there.
OF_TRAINING = {"train_samples": "num_samples", "train_length": "length"}
SETTINGS = (*OF_STEPS, *OF_TRAINING, *OF_CALIBRATION, *OF_RECIPES, "outlier_handling")

# Steps that are there to tame outliers, and settings of other steps that are, with the value that turns them off.
TAMING_STEPS = ("rotate", "smoothquant", "awq")
TAMING_SETTINGS = {"outliers": 0.0, "sparse": 0.0}


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Return a recipe with settings in place of its own.

    Args:
        recipe: the recipe.
        settings: values by name, one of ``SETTINGS``; None leaves the recipe's.

    Raises:
        ParetoError: a setting that no step of the recipe has, or a combination that a step refuses.

    """
    given = {name: value for name, value in settings.items() if value is not None}
    steps = list(recipe.steps)
    if given.get("outlier_handling") is False:
        steps = _untamed(recipe)
    for name in (*OF_STEPS, *OF_TRAINING):
        if name not in given:
            continue
        own = OF_TRAINING.get(name, name)
        having = [i for i, step in enumerate(steps) if _has(step, own)]
        if name in OF_ROUNDING and (rounding := [i for i in having if isinstance(steps[i], RoundStep)]):
            # A prune step that could round as well leaves it to the step that does.
            having = rounding
        if not having:
            methods = ", ".join(step.method for step in steps) or "none"
            raise ParetoError(f"--{name.replace('_', '-')}: no step of recipe {recipe.name} has it (steps: {methods})")
        for i in having:
            steps[i] = _changed(steps[i], {own: given[name]})
    for step in steps:
        step.check()
    calibration = _changed(
        recipe.calibration, {there: given[name] for name, there in OF_CALIBRATION.items() if name in given}
    )
    calibration.check()
    changed = _changed(recipe, {name: given[name] for name in OF_RECIPES if name in given})
    check(changed.exempt)
    return dataclasses.replace(changed, steps=tuple(steps), calibration=calibration)


Changed = TypeVar("Changed", Step, Calibration, Recipe)


def _changed(whole: Changed, values: Mapping[str, Any]) -> Changed:
    """Return a dataclass with other values, their types checked."""
    hints = typing.get_type_hints(type(whole))
    ready: dict[str, Any] = {name: checked(value, hints[name], name) for name, value in values.items()}
    return dataclasses.replace(whole, **ready)


def _has(step: Step, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(step))


def _untamed(recipe: Recipe) -> list[Step]:
    """Return the steps of a recipe without what they do about outliers.

    Raises:
        ParetoError: they do nothing about them.

    """
    steps: list[Step] = []
    for step in recipe.steps:
        if step.method in TAMING_STEPS:
            continue
        off: dict[str, Any] = {
            name: value
            for name, value in TAMING_SETTINGS.items()
            if isinstance(step, RoundStep) and _has(step, name) and getattr(step, name) != value
        }
        steps.append(dataclasses.replace(step, **off) if off else step)
    if steps == list(recipe.steps):
        raise ParetoError(
            f"--no-outlier-handling: recipe {recipe.name} does nothing about outliers; it would be "
            f"{', '.join(TAMING_STEPS)} before the rounding, or outliers kept apart in it"
        )
    return steps
