"""Reads the grid of a sweep: which points there are. Everything wrong with one is found here, before any work.

recipe: gptq-w4                     # what a point changes, unless it names its own
grid:                               # every combination of these
  group_size: [32, 64, 128]
  num_calibration_samples: [64, 128]
variants:                           # and these
  - {recipe: awq-w4}
  - {recipe: gptq-w4, budget: 4.25bits, exempt: [first]}
evaluation: {text: heldout.jsonl, num_windows: 10, window_tokens: 2048}
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kv_cache.errors import ParetoError
from quant_methods.mixed_precision.budget import Budget
from quant_methods.overrides import SETTINGS, override
from quant_methods.recipe import Recipe
from quant_methods.recipe_file import checked, load_recipe, read_yaml

KEYS = ("recipe", "grid", "variants", "evaluation")
POINT_KEYS = ("recipe", "budget", *SETTINGS)


@dataclass(frozen=True)
class Evaluation:
    """What points are measured on.

    Attributes:
        text: .txt or .jsonl, relative to the grid's file; None for the model's own samples.
        num_windows: windows of text.
        window_tokens: tokens in each.

    """

    text: Path | None = None
    num_windows: int = 10
    window_tokens: int = 2048


@dataclass(frozen=True)
class Point:
    """One compression of a sweep.

    Attributes:
        name: what it changes, such as ``gptq-w4 group_size=32``.
        settings: the same as data.
        recipe: what it carries out.
        budget: how much it may take, or None.

    """

    name: str
    settings: dict[str, Any]
    recipe: Recipe
    budget: Budget | None

    def determines(self) -> tuple[str, Budget | None]:
        """Return what determines the point's result."""
        return self.recipe.fingerprint(), self.budget


@dataclass(frozen=True)
class Sweep:
    """A grid.

    Attributes:
        points: in the order of the file.
        evaluation: what they are measured on.

    """

    points: list[Point]
    evaluation: Evaluation = field(default_factory=Evaluation)


def load_sweep(path: Path, recipe: str) -> Sweep:
    """Read a grid.

    Args:
        path: YAML.
        recipe: what points change if neither they nor the file name a recipe.

    Raises:
        ParetoError: no such file, no YAML, an unknown key, a value that makes no sense, or no or equal points.

    """
    data = read_yaml(path, "sweep")
    where = f"sweep {path}"
    if not isinstance(data, dict) or not (data.get("grid") or data.get("variants")):
        raise ParetoError(
            f"{where}: expected a mapping with 'grid' (lists to combine) or 'variants' (a list of points)"
        )
    _known(data, KEYS, where)
    base = data.get("recipe", recipe)
    if not isinstance(base, str):
        raise ParetoError(f"{where}: recipe: expected a name or a file, got {base!r}; several go under grid")
    settings = [*_combinations(data.get("grid") or {}, where), *_variants(data.get("variants") or [], where)]
    points: list[Point] = []
    for values in settings:
        point = point_of(values, base, path.parent, where)
        same = [other.name for other in points if other.determines() == point.determines()]
        if same:
            raise ParetoError(f"{where}: {point.name} is the same as {same[0]}; leave one out")
        points.append(point)
    return Sweep(points, _evaluation(data.get("evaluation") or {}, path.parent, where))


def _known(data: Mapping[Any, Any], keys: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in keys:
            raise ParetoError(f"{where}: unknown key {key!r}; valid keys: {', '.join(keys)}")


def _combinations(grid: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(grid, dict):
        raise ParetoError(f"{where}: grid: expected lists by setting, such as {{group_size: [64, 128]}}, got {grid!r}")
    _known(grid, POINT_KEYS, f"{where}: grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ParetoError(f"{where}: grid: {key}: expected a list of values to try, got {values!r}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []


def _variants(variants: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(variants, list) or not all(isinstance(variant, dict) and variant for variant in variants):
        raise ParetoError(f"{where}: variants: expected a list of points such as {{recipe: awq-w4}}, got {variants!r}")
    for variant in variants:
        _known(variant, POINT_KEYS, f"{where}: variants")
    return [dict(variant) for variant in variants]


def point_of(values: dict[str, Any], base: str, folder: Path, where: str) -> Point:
    """Return one compression.

    Args:
        values: settings by name, of ``POINT_KEYS``.
        base: the recipe where they name none.
        folder: where recipes in files lie.
        where: what errors start with.

    Raises:
        ParetoError: a recipe that there is not, or a setting that it does not have.

    """
    rest = {key: value for key, value in values.items() if key != "recipe"}
    recipe = values.get("recipe", base)
    name = " ".join([Path(str(recipe)).stem, *(f"{key}={_short(value)}" for key, value in rest.items())])
    try:
        if not isinstance(recipe, str):
            raise ParetoError(f"recipe: expected a name or a file, got {recipe!r}")
        budget = rest.pop("budget", None)
        file = folder / recipe
        loaded = load_recipe(str(file) if file.suffix in (".yaml", ".yml") and file.is_file() else recipe)
        return Point(
            name,
            dict(values),
            override(loaded, rest),
            None if budget is None else Budget.parse(str(budget)),
        )
    except ParetoError as error:
        raise ParetoError(f"{where}: point {name}: {error}") from error


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def _evaluation(data: Any, folder: Path, where: str) -> Evaluation:
    if not isinstance(data, dict):
        raise ParetoError(f"{where}: evaluation: expected a mapping, got {data!r}")
    _known(data, ("text", "num_windows", "window_tokens"), f"{where}: evaluation")
    types = {"text": str, "num_windows": int, "window_tokens": int}
    values = {key: checked(value, types[key], f"{where}: evaluation: {key}") for key, value in data.items()}
    if "text" in values:
        values["text"] = folder / values["text"]
        if not values["text"].is_file():
            raise ParetoError(f"{where}: evaluation: text: {values['text']}: no such file")
    return Evaluation(**values)
