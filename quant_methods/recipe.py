"""Recipes: typed, frozen descriptions of a compression, and the registry from a step's type to what performs it.

A recipe is a list of steps and the settings of their calibration. Each step is a frozen dataclass whose ``method``
names it in YAML; the module that implements a method declares the dataclass and registers its handler:

    @register("gptq")
    @dataclass(frozen=True)
    class GPTQ(WeightStep): ...

    @handles(GPTQ)
    def quantize(step: GPTQ, problem: LinearProblem) -> QuantizedLinear: ...

YAML that has an unknown key, a value of the wrong type or a combination that vLLM cannot serve is refused here, before
any work, with a line that names what would be right.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import yaml
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.grid import Grid

BUILT_IN = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Step:
    """One step of a recipe; the base of every step's dataclass."""

    method: ClassVar[str] = ""

    def check(self) -> None:
        """Refuse settings that make no sense or that vLLM cannot serve.

        Raises:
            ParetoError: with the alternative.

        """


@dataclass(frozen=True)
class WeightStep(Step):
    """A step that rounds weights to a grid of integer codes.

    Attributes:
        bits: 4 or 8.
        group_size: input channels that share a scale: 32, 64 or 128, or -1 for one scale per output channel.
        symmetric: without zero-points.
        activations: ``none`` keeps activations in 16 bits; ``int8`` rounds them at serving time, per token.
        targets: globs over module names; the first step that matches a layer quantizes it.

    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: Literal["none", "int8"] = "none"
    targets: tuple[str, ...] = ("*",)

    @property
    def grid(self) -> Grid:
        """The grid of codes."""
        return Grid(self.bits, self.group_size, self.symmetric)

    def check(self) -> None:
        """Refuse what vLLM 0.32 has no kernel for (its model_executor/kernels/linear says which it has)."""
        if self.bits not in (4, 8):
            raise ParetoError(f"bits: {self.bits} is not served by vLLM; use 4 or 8")
        if self.group_size not in (-1, 32, 64, 128):
            raise ParetoError(
                f"group_size: {self.group_size} has no kernel in vLLM; use 32, 64, 128, or -1 for one scale per channel"
            )
        if self.activations == "int8":
            if self.bits != 8 or self.group_size != -1 or not self.symmetric:
                raise ParetoError(
                    "activations: int8 needs 8-bit symmetric weights with one scale per channel "
                    "(bits 8, group_size -1, symmetric); vLLM multiplies int8 by int8 only in that layout. For other "
                    "weights use activations none"
                )
        elif self.bits == 8 and not self.symmetric:
            raise ParetoError(
                "8-bit weights with zero-points have no kernel in vLLM on CPU or Marlin; use symmetric, or 4 bits"
            )

    def devices(self) -> tuple[str, ...]:
        """Return the devices on which stock vLLM 0.32 serves the result: ``cpu``, ``cuda``."""
        # vLLM's CPU kernel for 16-bit activations (CPUWNA16LinearKernel) takes 4-bit weights alone.
        if self.activations == "none" and self.bits == 8:
            return ("cuda",)
        return ("cpu", "cuda")


@dataclass(frozen=True)
class Calibration:
    """What calibration runs on.

    Attributes:
        num_samples: sequences.
        length: tokens in each.
        seed: seed of everything random: sampling, and the KV-scale calibrator.

    """

    num_samples: int = 128
    length: int = 1024
    seed: int = 0

    def check(self) -> None:
        """Refuse settings without data.

        Raises:
            ParetoError: no sequence, or sequences shorter than 2 tokens.

        """
        if self.num_samples < 1 or self.length < 2:
            raise ParetoError(
                f"calibration needs at least 1 sequence of at least 2 tokens, got {self.num_samples} of {self.length}"
            )


@dataclass(frozen=True)
class Recipe:
    """A compression.

    Attributes:
        name: what the user called it.
        description: one line.
        steps: what is done, in order; empty to copy the weights.
        ignore: globs over module names (``lm_head``, ``*.down_proj``) that stay unquantized.
        calibration: the data.
        kv_scales: calibrate scales of a quantized KV cache in the same pass.

    """

    name: str
    description: str = ""
    steps: tuple[Step, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)
    calibration: Calibration = field(default_factory=Calibration)
    kv_scales: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as YAML would have it."""
        data = dataclasses.asdict(self)
        data["steps"] = [{"method": step.method, **dataclasses.asdict(step)} for step in self.steps]
        return data

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) over everything that determines the result; name and description do not."""
        data = self.to_dict()
        del data["name"], data["description"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@dataclass
class LinearProblem:
    """What a weight step gets: one linear layer and what calibration saw of its inputs.

    Attributes:
        name: the module's name.
        weight: float32 [out, in]; the handler may overwrite it.
        hessian: float32 [in, in], the mean of x x^T over the calibration tokens (None for a step without data).
        cross: float32 [in, in], the mean of (x_original - x) x^T, or None; what quantizing the layers before did.
        residual: float32 [out, in], the mean of (r_original - r) x^T for the residual stream r that this layer's
            output is added to, or None.
        scale_dtype: dtype that scales are stored in.

    """

    name: str
    weight: Tensor
    hessian: Tensor | None
    cross: Tensor | None
    residual: Tensor | None
    scale_dtype: torch.dtype


@dataclass
class QuantizedLinear:
    """A quantized linear layer.

    Attributes:
        codes: int8 [out, in].
        scale: [out, groups] in the stored dtype.
        zero_point: int8 [out, groups]; zeros on a symmetric grid.

    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Handler:
    """What performs a weight step.

    Attributes:
        quantize: solves one layer.
        needs_hessian: the calibrator must supply ``hessian``.
        needs_upstream: given the step, whether to supply ``cross`` and ``residual``.

    """

    quantize: Callable[[Any, LinearProblem], QuantizedLinear]
    needs_hessian: bool = False
    needs_upstream: Callable[[Any], bool] = lambda step: False


STEPS: dict[str, type[Step]] = {}
HANDLERS: dict[type[Step], Handler] = {}
StepType = TypeVar("StepType", bound=type[Step])


def register(method: str) -> Callable[[StepType], StepType]:
    """Make a step's dataclass known to YAML as ``method``."""

    def decorate(step_type: StepType) -> StepType:
        step_type.method = method
        STEPS[method] = step_type
        return step_type

    return decorate


def handles(
    step_type: type[Step],
    *,
    needs_hessian: bool = False,
    needs_upstream: Callable[[Any], bool] = lambda step: False,
) -> Callable[[Callable[[Any, LinearProblem], QuantizedLinear]], Callable[[Any, LinearProblem], QuantizedLinear]]:
    """Register the function that performs a step."""

    def decorate(
        function: Callable[[Any, LinearProblem], QuantizedLinear],
    ) -> Callable[[Any, LinearProblem], QuantizedLinear]:
        HANDLERS[step_type] = Handler(function, needs_hessian, needs_upstream)
        return function

    return decorate


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
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParetoError(f"recipe {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ParetoError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ParetoError(f"recipe {path}: expected a mapping with the key 'steps'")
    return parse_recipe({"name": path.stem, **data})


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain data.

    Raises:
        ParetoError: an unknown key or method, a value of the wrong type, or settings that cannot be served.

    """
    # Importing a method's module registers it.
    import quant_methods.gptq
    import quant_methods.rtn  # noqa: F401

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
    return _build(Recipe, data, where, steps=tuple(steps), calibration=calibration)


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
        arguments[key] = _checked(value, fields[key], f"{where}: {key}")
    return kind(**arguments)


def _checked(value: Any, hint: Any, where: str) -> Any:
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
