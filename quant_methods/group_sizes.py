"""Fits a recipe's group sizes to a model: what becomes of a layer whose width its group size does not divide.

Kernels want groups of one size all along a layer's input channels. Widths such as SmolLM2's 576 are no multiple of
128, the size that most recipes have. ``group_size_fallback`` of a step says what happens to such a layer: it gets the
largest size that divides its width (``lower``), it stays at 16 bits (``skip``), or the recipe is refused (``refuse``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.planes import INPUT_MULTIPLE
from quant_methods.fused import families
from quant_methods.steps import GROUP_SIZES, RoundStep
from quant_methods.stock_vllm import Serving

KERNEL_MULTIPLE = 32
"""Both of vLLM's 4-bit families want multiples of this: its CPU kernel refuses others, Marlin's tiles need them."""

ONE_GROUP = "vLLM serves experts wrongly of which some layers are one group wide and others are wider"


@dataclass(frozen=True)
class Fitted:
    """What becomes of a model's layers.

    Attributes:
        steps: full module name to step, its group size fitted; layers that stay at 16 bits are not among them.
        notes: what was changed and why, a line each.

    """

    steps: dict[str, RoundStep]
    notes: tuple[str, ...] = ()


def fitted(step: RoundStep, width: int) -> RoundStep | None:
    """Return a step with a group size that divides a layer's width, or None if its fallback makes none.

    Args:
        step: the step.
        width: the layer's input channels.

    """
    if step.group_size == -1 or width % step.group_size == 0:
        return step
    size = next((size for size in GROUP_SIZES if size < step.group_size and width % size == 0), None)
    return replace(step, group_size=size) if size is not None and step.group_size_fallback == "lower" else None


def fit_groups(steps: Mapping[str, RoundStep], shapes: Mapping[str, tuple[int, int]]) -> Fitted:
    """Fit the steps of a model's layers to their shapes.

    Args:
        steps: full module name to the step that is to quantize it, in model order.
        shapes: full module name to [out, in].

    Raises:
        ParetoError: a layer cannot have its step, and the step says ``refuse``.

    """
    found: dict[str, RoundStep] = {}
    # Which layers stay at 16 bits decides which format the others are stored in, and what that format can hold.
    native = Serving.of(steps.values()).plugin
    reasons: dict[str, str] = {}
    for name, step in steps.items():
        fit = fitted(step, shapes[name][1])
        obstacle = _obstacle(step, shapes[name], native=native)
        if step.group_size_fallback == "refuse" and (obstacle or fit is None):
            raise ParetoError(_refusal(name, step, shapes[name], obstacle))
        if obstacle or fit is None:
            end = name.rsplit(".", 1)[-1]
            by_size = f"the group size, {step.group_size}, does not divide their {shapes[name][1]} input channels"
            reasons[name] = f"{end} is {list(shapes[name])}, and {obstacle}" if obstacle else by_size
        else:
            found[name] = fit
    alone: dict[str, str] = {}
    for family in families(steps):
        # A layer goes with those that vLLM merges with it, and for the reason of the first that has one.
        reason = next((reasons[member] for member in family if member in reasons), None)
        # Only experts differ in width; vLLM wants all of a block's in groups of one size.
        size = None if reason else _common_size(family, found, [shapes[member][1] for member in family])
        if size is None:
            alone |= dict.fromkeys(family, reason or f"{ONE_GROUP}, and their widths have no smaller groups")
        else:
            found |= {member: replace(found[member], group_size=size) for member in family}
    kept = {name: step for name, step in found.items() if name not in alone}
    if alone and kept and Serving.of(kept.values()).plugin != native:
        again = fit_groups({name: steps[name] for name in kept}, shapes)
        return Fitted(again.steps, (*_alone_notes(alone), *again.notes))
    return Fitted(kept, (*_lowered_notes(steps, kept, shapes), *_alone_notes(alone)))


def _common_size(family: Sequence[str], steps: Mapping[str, RoundStep], widths: Sequence[int]) -> int | None:
    """Return the group size of layers that vLLM merges, or None if there is none that it serves.

    Marlin orders the scales of experts differently where all input channels are one group, and vLLM 0.32 and 0.33
    decide which order the first layers of an expert have by the width of its last one (vLLM's pull request 50196).

    Raises:
        ParetoError: a smaller size is needed, and the step says ``refuse``.

    """
    size = min(steps[member].group_size for member in family)
    if not size == min(widths) < max(widths):
        return size
    smaller = next((other for other in GROUP_SIZES if 0 < other < size and size % other == 0), None)
    fallback = steps[family[0]].group_size_fallback
    if fallback == "refuse":
        raise ParetoError(
            f"group size {size}: {ONE_GROUP} (see {family[0]}); use {smaller or 'another format'}, or let "
            "--group-size-fallback lower it"
        )
    return smaller if fallback == "lower" else None


def _obstacle(step: RoundStep, shape: tuple[int, int], *, native: bool) -> str | None:
    """Return why nothing serves a layer of this shape, whatever its group size; None if something does."""
    rows, width = shape
    if native and width % INPUT_MULTIPLE:
        return f"the format of ours holds multiples of {INPUT_MULTIPLE} input channels"
    if not native and step.activations == "none" and (width % KERNEL_MULTIPLE or rows % KERNEL_MULTIPLE):
        return f"vLLM's 4-bit kernels want multiples of {KERNEL_MULTIPLE}"
    return None


def _refusal(name: str, step: RoundStep, shape: tuple[int, int], obstacle: str | None) -> str:
    """Return why a recipe is refused for a layer, and what would help."""
    if obstacle:
        return f"{name} is {list(shape)}, and {obstacle}; leave it out with ignore: ['{name.rsplit('.', 1)[-1]}']"
    sizes = [str(size) for size in sorted(GROUP_SIZES) if shape[1] % size == 0]
    return (
        f"group size {step.group_size} does not divide the {shape[1]} input channels of {name}; sizes that do: "
        f"{', '.join([*sizes, '-1 (one scale per channel)'])}; or let --group-size-fallback lower it"
    )


def _lowered_notes(
    steps: Mapping[str, RoundStep], kept: Mapping[str, RoundStep], shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Return a line for every group size that was lowered."""
    changes: dict[tuple[int, int, str], list[str]] = {}
    for name, step in kept.items():
        asked, width = steps[name].group_size, shapes[name][1]
        reason = f"{asked} does not divide their {width} input channels"
        if fitted(steps[name], width) != step:
            sizes = {fit.group_size for other in kept if (fit := fitted(steps[other], shapes[other][1]))}
            same = step.group_size in sizes
            reason = "vLLM wants all experts of a block in groups of one size" if same else ONE_GROUP
        if step.group_size != asked:
            changes.setdefault((asked, step.group_size, reason), []).append(name)
    return [
        f"groups of {size} instead of {asked} in {_layers(names)}: {reason}"
        for (asked, size, reason), names in changes.items()
    ]


def _alone_notes(alone: Mapping[str, str]) -> list[str]:
    """Return a line for every reason why layers stay at 16 bits."""
    kinds: dict[str, list[str]] = {}
    for name, reason in alone.items():
        kinds.setdefault(reason, []).append(name)
    return [f"16 bits kept in {_layers(names)}: {reason}" for reason, names in kinds.items()]


def _layers(names: list[str]) -> str:
    """Return how many layers these are, and what their names end in."""
    ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return f"{len(names)} layer{'s' if len(names) > 1 else ''} ({', '.join(ends)})"
