"""What performs the steps of recipes, and what it gets: the registry that methods enter themselves in.

The module that implements a method declares its dataclass (``steps.py``) and registers its handler:

    @register("gptq")
    @dataclass(frozen=True)
    class GPTQ(RoundStep): ...

    @handles(GPTQ)
    def quantize(step: GPTQ, problem: LinearProblem) -> QuantizedLinear: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from quant_methods.formats.quantized import QuantizedLinear

if TYPE_CHECKING:
    from quant_methods.steps import PruneStep, RoundStep, Step


@dataclass
class LinearProblem:
    """What a step that prunes or rounds gets: one linear layer and what calibration saw of its inputs.

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
        dense: float32 [out, in], of a weight that was pruned, what it was before; else None. Where the pruned weight is
            zero, a rounding step has to leave it so.

    """

    name: str
    weight: Tensor
    hessian: Tensor | None
    cross: Tensor | None
    residual: Tensor | None
    scale_dtype: torch.dtype
    largest: Tensor | None = None
    ranges: tuple[Tensor, Tensor] | None = None
    dense: Tensor | None = None

    @property
    def kept(self) -> Tensor | None:
        """Bool [out, in], the weights that were not pruned; None: none was."""
        return None if self.dense is None else self.weight != 0


@dataclass
class ScalingProblem:
    """What a step that moves scales gets: layers that share an input x [tokens, in], and what calibration saw of it.

    Attributes:
        weights: float32 [out, in] of each layer.
        steps: the step that will quantize each; None for a layer that stays as it is.
        hessian: float32 [in, in], the mean of x x^T over the calibration tokens.
        largest: float32 [in], the largest |x|.
        mean: float32 [in], the mean |x|.
        sample: float32 [some tokens, in], evenly spread over the calibration set.

    """

    weights: list[Tensor]
    steps: list[RoundStep | None]
    hessian: Tensor
    largest: Tensor
    mean: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Handler:
    """What performs a rounding step.

    Attributes:
        quantize: solves one layer.
        needs_hessian: given the step, whether the calibrator must supply ``hessian``.
        needs_upstream: given the step, whether to supply ``cross`` and ``residual``.

    """

    quantize: Callable[[Any, LinearProblem], QuantizedLinear]
    needs_hessian: Callable[[Any], bool] = lambda step: False
    needs_upstream: Callable[[Any], bool] = lambda step: False


@dataclass(frozen=True)
class Pruner:
    """What performs a prune step.

    Attributes:
        prune: returns a layer's weight, float32 [out, in], with zeros; weights that are left may have changed.
        needs_hessian: given the step, whether the calibrator must supply ``hessian``.
        needs_upstream: given the step, whether to supply ``cross`` and ``residual``.
        and_round: prunes and rounds in one pass, given the step and ``PruneStep.rounding`` with a group size that fits;
            None where no such step has one.

    """

    prune: Callable[[Any, LinearProblem], Tensor]
    needs_hessian: Callable[[Any], bool]
    needs_upstream: Callable[[Any], bool]
    and_round: Callable[[Any, Any, LinearProblem], QuantizedLinear] | None


@dataclass(frozen=True)
class Tuned:
    """What a whole-model step did.

    Attributes:
        kl: KL(original || compressed) of the held-out sequences in nats a token: (step, value) of every look.
        kept: the step whose state was kept; 0 is the start.
        on_text: the values are the text's own loss instead, as the step was told to lower that.

    """

    kl: tuple[tuple[int, float], ...]
    kept: int
    on_text: bool = False

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Tuned:
        """Return what was written of these fields as JSON."""
        return cls(tuple((step, kl) for step, kl in told["kl"]), told["kept"], told.get("on_text", False))

    @property
    def before(self) -> float:
        """The value before the first step."""
        return self.kl[0][1]

    @property
    def after(self) -> float:
        """The value of the state that was kept."""
        return dict(self.kl)[self.kept]


class ModelRun(Protocol):
    """A whole-model step at work on an unfinished run."""

    tokens: Tensor
    """What it runs on, int64 [sequences, length]."""

    def run(self) -> Tuned:
        """Do the step, or take it up where it was interrupted."""
        ...

    def block_result(self, index: int) -> Path:
        """Return the file with a block's tensors as the step left them."""
        ...

    @property
    def outside_result(self) -> Path:
        """The file with what the step changed outside of the blocks; there is none if that is nothing."""
        ...


STEPS: dict[str, type[Step]] = {}
HANDLERS: dict[type[Step], Handler] = {}
PRUNERS: dict[type[Step], Pruner] = {}
TRANSFORMS: dict[type[Step], Callable[[Any, ScalingProblem], Tensor]] = {}
BLOCK_STEPS: dict[type[Step], Callable[[Any, Any], None]] = {}
SOURCE_STEPS: dict[type[Step], Callable[[Any, Any], Any]] = {}
MODEL_STEPS: dict[type[Step], Callable[..., ModelRun]] = {}
StepType = TypeVar("StepType", bound="type[Step]")


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


Prune = Callable[[Any, LinearProblem], Tensor]


def prunes(
    step_type: type[PruneStep],
    *,
    needs_hessian: Callable[[Any], bool] = lambda step: False,
    needs_upstream: Callable[[Any], bool] = lambda step: False,
    and_round: Callable[[Any, Any, LinearProblem], QuantizedLinear] | None = None,
) -> Callable[[Prune], Prune]:
    """Register the function that performs a prune step; see :class:`Pruner`."""

    def decorate(function: Prune) -> Prune:
        PRUNERS[step_type] = Pruner(
            function,
            lambda step: step.refit or needs_hessian(step),
            lambda step: needs_upstream(step) or (step.refit and getattr(step, "upstream", True)),
            and_round,
        )
        return function

    return decorate


Scale = Callable[[Any, ScalingProblem], Tensor]


def transforms(step_type: type[Step]) -> Callable[[Scale], Scale]:
    """Register what performs a step that moves scales: it returns float32 [in], by which inputs are divided."""

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


Made = TypeVar("Made", bound=Callable[..., Any])


def wraps_source(step_type: type[Step]) -> Callable[[Made], Made]:
    """Register what performs a step on the whole checkpoint: it makes, of step and ``Source``, the transformed one."""

    def decorate(made: Made) -> Made:
        SOURCE_STEPS[step_type] = made
        return made

    return decorate


def completes(step_type: type[Step]) -> Callable[[Made], Made]:
    """Register what performs a whole-model step: it makes a :class:`ModelRun`, see ``methods.trainer.Trainer``."""

    def decorate(made: Made) -> Made:
        MODEL_STEPS[step_type] = made
        return made

    return decorate
