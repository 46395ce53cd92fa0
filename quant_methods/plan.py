"""Decides, before any work, which layers a recipe quantizes and how, and refuses what cannot work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.kv_observer import unserved_kv
from quant_methods.exempt import globs
from quant_methods.experts import routers
from quant_methods.fused import families, is_expert
from quant_methods.group_sizes import Fitted, fit_groups
from quant_methods.handlers import HANDLERS, PRUNERS
from quant_methods.patterns import check_patterns, matches
from quant_methods.recipe import Recipe
from quant_methods.steps import BlockStep, ModelStep, PruneStep, RoundStep, ScaleStep, TrainStep
from quant_methods.stock_vllm import Serving


@dataclass(frozen=True)
class Plan:
    """What happens to each linear layer.

    Attributes:
        steps: full module name to the step that quantizes it, in model order.
        ignored: full names of the linear layers that are not quantized, in model order.
        transforms: steps that prepare a block before its layers are quantized, in order.
        outside: how many of the ignored, the last ones, are no linear layers inside blocks: the head, and what chooses
            experts, which vLLM has linear layers for.
        final: what is done at the end with the whole model in view, or None.
        training: what trains the pruned weights before they are rounded, or None.
        notes: what is done otherwise than the recipe says, a line each.
        kv_scales: scales of a quantized KV cache are calibrated.
        prunes: full module name to the step that prunes it, before it is quantized if it is, in model order.

    """

    steps: dict[str, RoundStep]
    ignored: list[str]
    transforms: tuple[ScaleStep, ...] = ()
    outside: int = 0
    final: ModelStep | None = None
    notes: tuple[str, ...] = ()
    kv_scales: bool = False
    prunes: dict[str, PruneStep] = field(default_factory=dict)
    training: TrainStep | None = None

    @property
    def changed(self) -> set[str]:
        """The full names of the layers that get other weights: quantized, pruned or both."""
        return {*self.steps, *self.prunes}

    @property
    def ignored_inside(self) -> list[str]:
        """The linear layers inside blocks that are not quantized."""
        return self.ignored[: len(self.ignored) - self.outside]

    @property
    def schemes(self) -> list[tuple[RoundStep, list[str]]]:
        """The distinct steps, each with the layers that it quantizes."""
        schemes: dict[RoundStep, list[str]] = {}
        for name, step in self.steps.items():
            schemes.setdefault(step, []).append(name)
        return list(schemes.items())

    @property
    def needs_data(self) -> bool:
        """Whether a step looks at activations."""
        return (
            bool(self.transforms)
            or any(step.needs_data for step in self.steps.values())
            or any(PRUNERS[type(step)].needs_hessian(step) for step in self.prunes.values())
        )

    @property
    def needs_original(self) -> bool:
        """Whether a step compares with the original model's activations."""
        return (
            any(isinstance(step, BlockStep) for step in self.transforms)
            or any(HANDLERS[type(step)].needs_upstream(step) for step in self.steps.values())
            or any(PRUNERS[type(step)].needs_upstream(step) for step in self.prunes.values())
        )

    @property
    def serving(self) -> Serving:
        """What serves the result."""
        found = Serving.of(self.steps.values())
        if any(map(is_expert, self.steps)):
            # vLLM's kernel for quantized experts on CPUs wants AMX, 4 bits and no zero-points.
            found = Serving(tuple(device for device in found.devices if device == "cuda"), found.plugin)
        return found

    @property
    def native(self) -> bool:
        """Whether the result is stored in the format of ours."""
        return self.serving.plugin


def make_plan(decoder: Decoder, recipe: Recipe, model_dir: Path) -> Plan:
    """Assign a step to every linear layer.

    Raises:
        ParetoError: nothing is matched, or nothing by one of the globs, a layer cannot have its step's group size (and
            the step says to refuse), layers that vLLM merges would be stored differently, a step is out of place, or
            KV scales are all that is wanted, and no quantized KV cache serves the model.

    """
    training = next((step for step in recipe.steps if isinstance(step, TrainStep)), None)
    final = next((step for step in recipe.steps if isinstance(step, ModelStep) and step is not training), None)
    rounding, round_steps = recipe.rounding, [step for step in recipe.steps if isinstance(step, RoundStep)]
    pruning = [step for step in recipe.steps if isinstance(step, PruneStep)]
    _check_pruning(recipe, pruning, round_steps)
    if training is not None:
        _check_training(recipe, training, pruning)
    steps: dict[str, RoundStep] = {}
    prunes: dict[str, PruneStep] = {}
    ignore = (*recipe.ignore, *globs(recipe.exempt, decoder))
    _check_names(decoder, recipe)
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(len(decoder.blocks)):
        chosen: dict[str, RoundStep | None] = {}
        for local, linear in decoder.linears(index).items():
            name = decoder.name(index, local)
            shapes[name] = linear.out_features, linear.in_features
            step = prune = None
            if not matches(name, ignore):
                step = next((s for s in round_steps if matches(name, s.targets)), None)
                prune = next((s for s in pruning if matches(name, s.targets)), None)
                step = step if prune is None else prune.rounding or step
            chosen[local] = step
            if step is not None:
                steps[name] = step
            if prune is not None:
                _check_pattern(name, prune, linear.in_features)
                prunes[name] = prune
            _check_store(name, step, prune)
        _check_fused(decoder.name(index, ""), chosen)
    steps, stored = _storable(steps)
    fit = fit_groups(steps, shapes)
    transforms = tuple(step for step in recipe.steps if isinstance(step, ScaleStep))
    _check_experts(recipe, fit, prunes)
    if steps and not fit.steps and not prunes:
        raise ParetoError(f"recipe {recipe.name}: nothing to compress: {'; '.join(fit.notes)}")
    ignored = [name for name in shapes if name not in fit.steps]
    if (rounding or pruning) and not steps and not prunes:
        raise ParetoError(
            f"recipe {recipe.name}: nothing to compress: no linear layer of {model_dir.name} is left by targets, "
            f"ignore ({', '.join(recipe.ignore)}) and exempt ({', '.join(recipe.exempt)})"
        )
    if final is not None and not rounding:
        raise ParetoError(
            f"recipe {recipe.name}: {final.method} trains what a step that rounds weights made, and there is none; add "
            "one, e.g. {method: rtn}"
        )
    if (transforms or (recipe.steps and not pruning)) and not rounding:
        raise ParetoError(
            f"recipe {recipe.name}: {recipe.steps[0].method} prepares weights for a step that rounds them, and there "
            "is none; add one, e.g. {method: rtn}"
        )
    if any(step.static for step in rounding) and (final or any(isinstance(t, BlockStep) for t in transforms)):
        raise ParetoError(
            f"recipe {recipe.name}: activations: int8_static has scales fixed by calibration, and tune and omniquant "
            "train with those of each token; use int8 with them"
        )
    for transform in transforms:
        if isinstance(transform, BlockStep):
            for follower in rounding:
                transform.check_next(follower)
    if not rounding and not pruning and not recipe.kv_scales:
        raise ParetoError(f"recipe {recipe.name}: nothing to do: it has no steps and kv_scales is off")
    outside, kv_scales = _outside(decoder), recipe.kv_scales
    slow = {step.bulk_form.slow_on_cuda(): None for step in fit.steps.values()}
    notes = (*stored, *fit.notes, *(line for line in slow if line is not None))
    if kv_scales and (reason := unserved_kv(decoder.base, decoder.config)):
        if not rounding and not pruning:
            raise ParetoError(
                f"recipe {recipe.name}: a quantized KV cache does not serve {reason}, so that KV scales would be of no "
                f"use; serve {model_dir.name} with --kv-cache-dtype auto"
            )
        kv_scales = False
        notes += (
            f"no KV scales are made: a quantized KV cache does not serve {reason}; serve with --kv-cache-dtype auto",
        )
    return Plan(fit.steps, ignored + outside, transforms, len(outside), final, notes, kv_scales, prunes, training)


def _outside(decoder: Decoder) -> list[str]:
    """Return the names of what vLLM has linear layers for and no step does: those not in blocks, and routers."""
    return [
        name
        for name, module in decoder.model.named_modules()
        if type(module).__name__ == "Linear" and not name.startswith(decoder.prefix + ".")
    ] + routers(decoder.model)


def _check_names(decoder: Decoder, recipe: Recipe) -> None:
    """Refuse globs that match nothing."""
    inside = [decoder.name(index, local) for index in range(len(decoder.blocks)) for local in decoder.linears(index)]
    check_patterns(f"recipe {recipe.name}, ignore", recipe.ignore, [*inside, *_outside(decoder), *_embeddings(decoder)])
    for step in recipe.steps:
        targets: tuple[str, ...] = getattr(step, "targets", ())
        check_patterns(f"recipe {recipe.name}, targets of {step.method}", targets, inside)


def _embeddings(decoder: Decoder) -> list[str]:
    """Return the names of the embeddings, which are never quantized and may be ignored all the same."""
    given = decoder.model.get_input_embeddings()
    return [name for name, module in decoder.model.named_modules() if module is given]


def _check_fused(prefix: str, chosen: dict[str, RoundStep | None]) -> None:
    for family in families(chosen):
        if len({chosen[local] for local in family}) > 1:
            quantized = next(local for local in family if chosen[local] is not None)
            different = next(local for local in family if chosen[local] != chosen[quantized])
            merged = "a block's experts" if is_expert(family[0]) else ", ".join(n.rsplit(".", 1)[-1] for n in family)
            raise ParetoError(
                f"{prefix}{quantized} and {prefix.split('.')[-2]}.{different} would be stored differently, and vLLM "
                f"merges {merged} into one; ignore or target them together"
            )


def _check_pruning(recipe: Recipe, pruning: list[PruneStep], rounding: list[RoundStep]) -> None:
    """Refuse what would not leave the zeros of prune steps what they are."""
    for step in pruning:
        for follower in rounding:
            step.check_next(follower)
        for other in recipe.steps:
            if isinstance(other, BlockStep):
                raise ParetoError(
                    f"recipe {recipe.name}: {other.method} trains weights without regard to {step.method}'s zeros, "
                    f"which would be lost; leave {other.method} out"
                )


def _check_training(recipe: Recipe, training: TrainStep, pruning: list[PruneStep]) -> None:
    """Refuse to train weights that are not pruned, that are rounded already, or that another step prepared."""
    where, others = f"recipe {recipe.name}: {training.method}", [step for step in pruning if step is not training]
    if not pruning:
        raise ParetoError(
            f"{where} trains what a prune step left, and there is none; add one, e.g. {{method: sparsegpt}}"
        )
    if isinstance(training, PruneStep) and others:
        raise ParetoError(f"{where} chooses zeros itself; leave {others[0].method} out, or take recover in its place")
    if rounded := next((step for step in others if step.rounding is not None), None):
        raise ParetoError(
            f"{where} trains weights in 16 bits, and {rounded.method} with bits has rounded them; leave bits out and "
            "add {method: gptq} after it"
        )
    if not any(step.from_dense for step in pruning) and not training.on_text:
        raise ParetoError(
            f"{where} aims at what the dense model puts out, and {pruning[0].method} starts from one that was pruned; "
            "give loss: text"
        )
    if before := next((step for step in recipe.steps if step.kind == "transform"), None):
        raise ParetoError(f"{where} trains the model as it is stored; leave {before.method} out")


def _check_pattern(name: str, step: PruneStep, width: int) -> None:
    """Refuse an N:M pattern for a layer that ends inside of one."""
    if step.kept_among is not None and width % step.kept_among[1]:
        raise ParetoError(
            f"{name} has {width} input channels, which are not whole groups of {step.kept_among[1]} as pattern "
            f"{step.pattern} wants them; leave it out with ignore: ['{name.rsplit('.', 1)[-1]}'], or take pattern any"
        )


def _check_store(name: str, step: RoundStep | None, prune: PruneStep | None) -> None:
    """Refuse to leave zeros out of a layer that does not get them where they can be left out."""
    if step is None or step.store == "dense":
        return
    if prune is None:
        pruned = "pattern '2:4'" if step.store == "2:4" else "e.g. {method: sparsegpt}"
        raise ParetoError(
            f"{name} is not pruned, and {step.method} is to leave zeros out; prune it with {pruned}, or give "
            "store: dense"
        )
    if step.store == "2:4" and not prune.fits_2_of_4:
        raise ParetoError(
            f"{name} is pruned with pattern {prune.pattern}, and {step.method} is to store two of four weights; prune "
            "it with pattern '2:4', or give store: bitmap or dense"
        )


def _storable(steps: dict[str, RoundStep]) -> tuple[dict[str, RoundStep], tuple[str, ...]]:
    """Return the steps as layers of this model can be stored, and a line for what is stored otherwise than asked."""
    sparse = any(step.store != "dense" for step in steps.values())
    if not sparse or not any(map(is_expert, steps)):
        return steps, ()
    note = "zeros are stored as codes too: vLLM has no kernel of experts that leaves them out"
    return {name: replace(step, store="dense") for name, step in steps.items()}, (note,)


def _check_experts(recipe: Recipe, fit: Fitted, prunes: dict[str, PruneStep]) -> None:
    """Refuse what is not there for experts: formats that vLLM has no kernel of experts for, and methods."""
    training = next((step for step in recipe.steps if isinstance(step, TrainStep)), None)
    if training is not None and (pruned := next((name for name in prunes if is_expert(name)), None)):
        raise ParetoError(
            f"recipe {recipe.name}: {pruned} is an expert's, and {training.method} does not know mixtures of experts; "
            "leave experts out with --ignore '*.experts.*'"
        )
    experts = [name for name in fit.steps if is_expert(name)]
    if not experts:
        return
    where, alone = f"recipe {recipe.name}: {experts[0]}", "or leave experts out with --ignore '*.experts.*'"
    if other := next((step for step in recipe.steps if not isinstance(step, PruneStep | RoundStep)), None):
        raise ParetoError(
            f"{where} is an expert's, and {other.method} does not know mixtures of experts; use gptq or rtn "
            f"alone (gptq-w4), {alone}"
        )
    if Serving.of(fit.steps.values()).plugin or any(fit.steps[name].activations != "none" for name in experts):
        raise ParetoError(
            f"{where} is an expert's, and vLLM serves experts of 4 bits, or of 8 bits without zero-points, with 16-bit "
            f"activations: use gptq-w4, gptq-w8a16 or rtn-w4, {alone}"
        )
