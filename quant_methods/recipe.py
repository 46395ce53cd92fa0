"""Recipes: typed, frozen descriptions of a compression, and the registry from a step's type to what performs it.

A recipe is a list of steps and the settings of their calibration. Each step is a frozen dataclass whose ``method``
names it in YAML; the module that implements a method declares the dataclass and registers its handler:

    @register("gptq")
    @dataclass(frozen=True)
    class GPTQ(WeightStep): ...

    @handles(GPTQ)
    def quantize(step: GPTQ, problem: LinearProblem) -> QuantizedLinear: ...

A :class:`WeightStep` rounds weights; a :class:`TransformStep` goes before it and changes a block without changing what
it computes, so that it rounds better. ``recipe_file.py`` reads recipes from YAML.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import Grid
from quant_methods.formats.parts.grid_codes import GridForm
from quant_methods.formats.parts.part import BulkForm
from quant_methods.formats.parts.table_codes import TableForm
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.model_source import digest

GROUP_SIZES = (128, 64, 32)
"""The sizes of groups that vLLM's kernels and ours serve, beside whole rows."""


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
        bits: of a code, 2 to 8.
        group_size: input channels that share a scale: 32, 64 or 128, or -1 for one scale per output channel.
        symmetric: without zero-points.
        activations: ``none`` keeps activations in 16 bits; ``int8`` and ``int6`` round them at serving time with a
            scale for each token, ``int8_static`` with one that calibration fixes for each layer.
        targets: globs over module names; the first step that matches a layer quantizes it.
        outliers: fraction of the input channels that is kept apart in more bits (``outlier_split.py``).
        outlier_bits: of a weight there: 16 or 8.
        outlier_choice: which channels those are, by ``range``, ``energy`` or ``threshold`` of their activations.
        rank: of a product that makes up for the error (``zeroquant.py``); 0: none.
        rank_metric: which error, that of the layer's output (``activations``) or of its ``weights``.
        per_tensor: one scale for the whole weight, with group_size -1. It is stored once for each output channel, so
            that every kernel serves it: for comparing, it saves nothing.
        group_size_fallback: what becomes of a layer whose input channels the group size does not divide: ``lower``
            takes the largest size that does, ``skip`` leaves the layer at 16 bits, ``refuse`` refuses the recipe. A
            layer that no size fits stays at 16 bits unless the recipe is to be refused (``group_sizes.py``).

    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: Literal["none", "int8", "int6", "int8_static"] = "none"
    targets: tuple[str, ...] = ("*",)
    outliers: float = 0.0
    outlier_bits: int = 16
    outlier_choice: Literal["range", "energy", "threshold"] = "range"
    rank: int = 0
    rank_metric: Literal["activations", "weights"] = "activations"
    per_tensor: bool = False
    group_size_fallback: Literal["lower", "skip", "refuse"] = "lower"

    table: ClassVar[bool] = False
    """Whether codes are indices into a table of each output channel."""

    @property
    def plain(self) -> bool:
        """Whether the result is codes on a grid and nothing else; steps that make other parts say no."""
        return not self.outliers and not self.rank

    @property
    def needs_data(self) -> bool:
        """Whether the step looks at activations."""
        by_output = self.rank > 0 and self.rank_metric == "activations"
        return self.outliers > 0 or self.static or by_output or HANDLERS[type(self)].needs_hessian(self)

    @property
    def static(self) -> bool:
        """Whether activations are rounded with scales that calibration fixes."""
        return self.activations == "int8_static"

    @property
    def grid(self) -> Grid:
        """The grid of codes."""
        return Grid(self.bits, self.group_size, self.symmetric, self.per_tensor)

    @property
    def bulk_form(self) -> BulkForm:
        """How the format of ours stores the codes."""
        return TableForm(self.bits) if self.table else GridForm(self.bits, self.group_size, self.symmetric)

    def check(self) -> None:
        """Refuse what neither vLLM 0.32 nor this plugin serves."""
        if not 2 <= self.bits <= 8:
            raise ParetoError(f"bits: {self.bits} is not served; use 2 to 8")
        if self.group_size not in (-1, *GROUP_SIZES):
            raise ParetoError(
                f"group_size: {self.group_size} has no kernel in vLLM; use 32, 64, 128, or -1 for one scale per channel"
            )
        if self.per_tensor and self.group_size != -1:
            raise ParetoError(f"per_tensor means one group: give group_size -1 with it, not {self.group_size}")
        if not 0 <= self.outliers < 0.5:
            raise ParetoError(f"outliers: {self.outliers} is not in [0, 0.5); it is a fraction, and 0.01 is usual")
        if self.outlier_bits not in (8, 16):
            raise ParetoError(f"outlier_bits: {self.outlier_bits} is neither 8 nor 16")
        if self.rank < 0:
            raise ParetoError(f"rank: {self.rank} is negative; 8 is usual, and 0 adds nothing")
        if self.static and not (self.bits == 8 and self.group_size == -1 and self.symmetric and self.plain):
            raise ParetoError(
                "activations: int8_static goes with 8-bit weights, group_size -1, symmetric, nothing beside them: "
                "vLLM has no other kernel for it; int8 rounds per token, for weights of any kind"
            )

    def stock_devices(self) -> tuple[str, ...]:
        """Return the devices on which stock vLLM 0.32 serves the result: ``cpu``, ``cuda``, or none.

        Its kernels are listed in its model_executor/kernels/linear: int8 activations by 8-bit symmetric weights with
        one scale per channel; 16-bit activations by 4-bit weights, and on CUDA (Marlin) by symmetric 8-bit weights.
        Everything else is served by this plugin, from the format of ``native_format.py``. On CPUs with AMX vLLM rounds
        activations per token whatever the checkpoint says, so that static scales are for CUDA.
        """
        if not self.plain:
            return ()
        if self.static:
            return ("cuda",)
        if self.activations == "int8":
            return ("cpu", "cuda") if self.bits == 8 and self.group_size == -1 and self.symmetric else ()
        if self.activations != "none" or self.bits not in (4, 8):
            return ()
        if self.bits == 8:
            return ("cuda",) if self.symmetric else ()
        return ("cpu", "cuda")


@dataclass(frozen=True)
class Serving:
    """What serves a checkpoint.

    Attributes:
        devices: where: ``cpu``, ``cuda``.
        plugin: vLLM with this plugin does; else stock vLLM does.

    """

    devices: tuple[str, ...]
    plugin: bool

    @classmethod
    def of(cls, steps: Iterable[WeightStep]) -> Serving:
        """Return what serves a checkpoint whose layers went through these steps."""
        stock = {"cpu", "cuda"}
        for step in steps:
            if not step.stock_devices():
                return cls(("cpu", "cuda"), plugin=True)
            stock &= set(step.stock_devices())
        return cls(tuple(sorted(stock)), plugin=False)

    def __str__(self) -> str:
        """Return it in words."""
        what = "vLLM with this plugin" if self.plugin else "stock vLLM"
        return f"{what} on {' and '.join(device.upper() for device in self.devices)}"


@dataclass(frozen=True)
class TransformStep(Step):
    """A step that moves scales between layers and their inputs, without changing what a block computes.

    Attributes:
        targets: globs over module names; a scale is moved where all layers that share an input match.

    """

    targets: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class BlockStep(TransformStep):
    """A transform step that has a whole block in view, and what the block should put out."""

    def check_next(self, step: WeightStep) -> None:
        """Refuse a weight step that cannot use what this one learns.

        Raises:
            ParetoError: with the alternative.

        """


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
        exempt: names of parts of the model that stay unquantized too; see ``exempt.py``.
        calibration: the data.
        kv_scales: calibrate scales of a quantized KV cache in the same pass.

    """

    name: str
    description: str = ""
    steps: tuple[Step, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)
    exempt: tuple[str, ...] = ()
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
        return digest(data)


@dataclass
class LinearProblem:
    """What a weight step gets: one linear layer and what calibration saw of its inputs.

    Attributes:
        name: the module's name.
        weight: float32 [out, in]; the handler may overwrite it.
        hessian: float32 [in, in], the mean of x x^T over the calibration tokens (None for a step without data).
        cross: float32 [in, in], the mean of (x_original - x) x^T, or None; what quantizing the layers before did.
        residual: float32 [out, in], the mean of (r_original - r) x^T for the residual stream r that this layer's
            output is added to, or None. It may hold ``weight @ cross`` too, and ``cross`` is None then.
        scale_dtype: dtype that scales are stored in.
        largest: float32 [in], the largest |x| (None unless the step keeps outliers apart).
        ranges: (scale, zero-point), float32 [out, groups], that an earlier step learned for the weight, or None.

    """

    name: str
    weight: Tensor
    hessian: Tensor | None
    cross: Tensor | None
    residual: Tensor | None
    scale_dtype: torch.dtype
    largest: Tensor | None = None
    ranges: tuple[Tensor, Tensor] | None = None


@dataclass
class ScalingProblem:
    """What a transform step gets: linear layers that share an input x [tokens, in], and what calibration saw of it.

    Attributes:
        weights: float32 [out, in] of each layer.
        steps: the step that will quantize each; None for a layer that stays as it is.
        hessian: float32 [in, in], the mean of x x^T over the calibration tokens.
        largest: float32 [in], the largest |x|.
        mean: float32 [in], the mean |x|.
        sample: float32 [some tokens, in], evenly spread over the calibration set.

    """

    weights: list[Tensor]
    steps: list[WeightStep | None]
    hessian: Tensor
    largest: Tensor
    mean: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Handler:
    """What performs a weight step.

    Attributes:
        quantize: solves one layer.
        needs_hessian: given the step, whether the calibrator must supply ``hessian``.
        needs_upstream: given the step, whether to supply ``cross`` and ``residual``.

    """

    quantize: Callable[[Any, LinearProblem], QuantizedLinear]
    needs_hessian: Callable[[Any], bool] = lambda step: False
    needs_upstream: Callable[[Any], bool] = lambda step: False


STEPS: dict[str, type[Step]] = {}
HANDLERS: dict[type[Step], Handler] = {}
TRANSFORMS: dict[type[Step], Callable[[Any, ScalingProblem], Tensor]] = {}
BLOCK_STEPS: dict[type[Step], Callable[[Any, Any], None]] = {}
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
    needs_hessian: Callable[[Any], bool] = lambda step: False,
    needs_upstream: Callable[[Any], bool] = lambda step: False,
) -> Callable[[Callable[[Any, LinearProblem], QuantizedLinear]], Callable[[Any, LinearProblem], QuantizedLinear]]:
    """Register the function that performs a step."""

    def decorate(
        function: Callable[[Any, LinearProblem], QuantizedLinear],
    ) -> Callable[[Any, LinearProblem], QuantizedLinear]:
        HANDLERS[step_type] = Handler(function, needs_hessian, needs_upstream)
        return function

    return decorate


Scale = Callable[[Any, ScalingProblem], Tensor]


def transforms(step_type: type[Step]) -> Callable[[Scale], Scale]:
    """Register the function that performs a transform step: it returns float32 [in], by which inputs are divided."""

    def decorate(function: Scale) -> Scale:
        TRANSFORMS[step_type] = function
        return function

    return decorate


Train = TypeVar("Train", bound=Callable[[Any, Any], None])


def trains(step_type: type[Step]) -> Callable[[Train], Train]:
    """Register the function that performs a block step: it changes a ``methods.scaling.ScaledBlock`` in place."""

    def decorate(function: Train) -> Train:
        BLOCK_STEPS[step_type] = function
        return function

    return decorate


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a module's full name, or its last parts, match one of the globs.

    ``lm_head`` and ``down_proj`` match by last part, ``model.layers.0.*`` by full name.
    """
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns)
