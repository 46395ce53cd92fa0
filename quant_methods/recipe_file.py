"""Reads recipes: built-in ones by name, and YAML files.

YAML that has an unknown key, a value of the wrong type or a combination that vLLM cannot serve is refused here, before
any work, with a line that names what would be right.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

# Importing a method's module registers it.
import quant_methods.methods.awq
import quant_methods.methods.gptq
import quant_methods.methods.kept
import quant_methods.methods.omniquant
import quant_methods.methods.pruning
import quant_methods.methods.rotation
import quant_methods.methods.rtn
import quant_methods.methods.smoothquant
import quant_methods.methods.sparsegpt
import quant_methods.methods.squeezellm
import quant_methods.methods.trellis
import quant_methods.training.movement
import quant_methods.training.recovery
import quant_methods.training.tuning  # noqa: F401
from kv_cache.errors import ParetoError
from quant_methods.handlers import STEPS
from quant_methods.recipe import Calibration, Recipe

BUILT_IN = Path(__file__).parent / "recipes"


def built_in_recipes() -> dict[str, Path]:
    """Return the recipes that ship with the package, by name."""
    return {path.stem: path for path in sorted(BUILT_IN.glob("*.yaml"))}


def load_recipe(name: str) -> Recipe:
    """Return a recipe by built-in name or YAML file.

    Raises:
        ParetoError: unknown name, unreadable file, or a bad recipe.

    """
    recipes = built_in_recipes()
    path = recipes.get(name, Path(name))
    if name not in recipes and not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise ParetoError(f"recipe {name}: no such file")
        raise ParetoError(f"unknown recipe {name!r}; built-in recipes: {', '.join(recipes)}; or give a YAML file")
    data = read_yaml(path, "recipe")
    if not isinstance(data, dict):
        raise ParetoError(f"recipe {path}: expected a mapping with the key 'steps'")
    return parse_recipe({"name": path.stem, **data})


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file holds.

    Raises:
        ParetoError: it cannot be read, or is no YAML; ``what`` says what the file was for.

    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParetoError(f"{what} {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ParetoError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain data.

    Raises:
        ParetoError: an unknown key or method, a value of the wrong type, or settings that cannot be served.

    """
    where = f"recipe {data.get('name', '')}".strip()
    data = dict(data)
    raw_steps = data.pop("steps", [])
    raw_calibration = data.pop("calibration", {})
    if not isinstance(raw_steps, list) or not all(isinstance(step, dict) for step in raw_steps):
        raise ParetoError(f"{where}: steps: expected a list of mappings with the key 'method'")
    if not isinstance(raw_calibration, dict):
        raise ParetoError(f"{where}: calibration: expected a mapping")
    steps = []
    for raw in raw_steps:
        values = dict(raw)
        method = values.pop("method", None)
        if method not in STEPS:
            raise ParetoError(f"{where}: unknown method {method!r}; methods: {', '.join(sorted(STEPS))}")
        step = _build(STEPS[method], values, f"{where}: step {method}")
        step.check()
        steps.append(step)
    calibration = _build(Calibration, raw_calibration, f"{where}: calibration")
    calibration.check()
    known = {f.name for f in dataclasses.fields(Recipe)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ParetoError(f"{where}: unknown key {unknown[0]!r}; valid keys: {', '.join(sorted(known))}")
    recipe = _build(Recipe, data, where, steps=tuple(steps), calibration=calibration)
    recipe.check()
    return recipe


Built = TypeVar("Built")


def _build(kind: type[Built], values: Mapping[str, Any], where: str, **ready: Any) -> Built:
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = dict(ready)
    for key, value in values.items():
        if key not in fields:
            raise ParetoError(
                f"{where}: unknown key {key!r}; valid keys: {', '.join(sorted(set(fields) - set(ready)))}"
            )
        arguments[key] = checked(value, fields[key], f"{where}: {key}")
    return kind(**arguments)


def checked(value: Any, hint: Any, where: str) -> Any:
    """Return a value from YAML as a field with this type hint takes it.

    Raises:
        ParetoError: it is of another type; ``where`` says which field it was for.

    """
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ParetoError(f"{where}: {value!r} is not one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ParetoError(f"{where}: expected a list of strings, got {value!r}")
        return tuple(value)
    if origin is types.UnionType:
        return value
    # bool is an int to Python, and a group size of `true` is a mistake.
    good = isinstance(value, hint) and not (hint is not bool and isinstance(value, bool))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not good:
        raise ParetoError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
