"""What a bit budget is spent on: units, the layers that vLLM stores alike, and the widths that they may have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.fused import experts_of, families
from quant_methods.group_sizes import fitted
from quant_methods.plan import Plan
from quant_methods.steps import PruneStep, RoundStep


@dataclass(frozen=True)
class Width:
    """How a layer may be stored.

    Attributes:
        bits: a code's; 16 for a layer left alone.
        group_size: input channels that share a scale; None for the recipe's.
        percent: of its weights that a prune step makes zero.

    """

    bits: int
    group_size: int | None = None
    percent: float = 0

    def __str__(self) -> str:
        """Return what ``parse`` takes."""
        text = f"{self.bits}" if self.group_size is None else f"{self.bits}g{self.group_size}"
        return f"{text}s{self.percent:.10g}" if self.percent else text

    @property
    def whole(self) -> bool:
        """Whether the layer is left alone."""
        return self.bits == 16 and not self.percent

    @property
    def rank(self) -> tuple[int, int, float]:
        """What widths are sorted by: few bits first, large groups first, many zeros first."""
        return self.bits, -(self.group_size or 10**6), -self.percent

    @staticmethod
    def parse(text: str) -> Width:
        """Return the width that ``4``, ``4g32`` (4 bits in groups of 32) or ``4s50`` (half of the weights zero) means.

        Raises:
            ParetoError: it means none.

        """
        match = re.fullmatch(r"(\d+)(?:g(\d+))?(?:s(\d+(?:\.\d+)?))?", text)
        if not match or (int(match[1]) == 16 and match[2]):
            raise ParetoError(
                f"width {text!r}: expected bits, or bits and a group size, such as 4 or 4g32; or 16; each also with "
                "the percentage of zeros, such as 4s50"
            )
        return Width(int(match[1]), int(match[2]) if match[2] else None, float(match[3] or 0))

    def step(self, base: RoundStep) -> RoundStep:
        """Return a recipe's step at this width.

        Raises:
            ParetoError: the step cannot have it.

        """
        if base.bitmap:
            raise ParetoError(f"{base.method}: a budget chooses bits, bitmap fixes them at {base.bits}: leave it out")
        # 8-bit weights with zero-points have no kernel.
        changed = replace(base, bits=self.bits, symmetric=base.symmetric or self.bits == 8)
        if self.group_size is not None:
            changed = replace(changed, group_size=self.group_size)
        changed.check()
        return changed

    def prune(self, base: PruneStep | None) -> PruneStep:
        """Return a recipe's prune step at this share of zeros.

        Raises:
            ParetoError: there is no such step, or it cannot have it.

        """
        if base is None:
            raise ParetoError(
                f"width {self} has zeros, and the recipe has no step that prunes; put one before the step that rounds, "
                "e.g. {method: sparsegpt}"
            )
        if base.pattern != "any" or base.rounding is not None:
            given, instead = ("bits", "let gptq follow") if base.rounding else ("pattern", "leave it out")
            raise ParetoError(
                f"{base.method}: a budget chooses how many zeros a layer has; {given} fixes it: {instead}"
            )
        changed = replace(base, sparsity=self.percent / 100)
        changed.check()
        return changed

    def stored(self, dense: int, weights: int, bits: int) -> int:
        """Return the bits that a layer takes where zeros are left out: those there are, and a bitmap of their places.

        Args:
            dense: bits that it takes with all weights stored.
            weights: how many these are.
            bits: that each takes, scales aside.

        """
        return dense if not self.percent else dense + weights - self.zeros(weights) * bits

    def zeros(self, weights: int) -> int:
        """Return how many of some weights are zero."""
        return round(weights * self.percent / 100)

    def steps_of(self, base: RoundStep, names: Sequence[str], inputs: Sequence[int]) -> list[RoundStep]:
        """Return the steps of a unit's layers at this width, their group size fitted to all of them.

        Args:
            base: the layers' step in the recipe.
            names: their full names.
            inputs: their input channels.

        Raises:
            ParetoError: the step cannot have this width, or a layer cannot have its group size.

        """
        found = []
        for name, channels in zip(names, inputs, strict=True):
            step = fitted(self.step(base), channels)
            if step is None:
                raise ParetoError(
                    f"width {self}: {self.group_size} does not divide the {channels} input channels of {name}; name "
                    "other --widths, or let --group-size-fallback lower it"
                )
            found.append(step)
        # Only experts differ in width; vLLM wants all of a block's in groups of one size.
        size = min(step.group_size for step in found)
        return [replace(step, group_size=size) for step in found]


WIDTHS = tuple(map(Width, (3, 4, 5, 6, 8, 16)))
PERCENTS = (0, 20, 40, 50, 60, 70)
"""Zeros that a layer of a recipe that prunes may have, unless widths are named."""


@dataclass(frozen=True)
class Choice:
    """A unit at one width.

    Attributes:
        width: the width, as ``Width.parse`` takes it.
        stored: bits of storage, scales, zero-points and the places of zeros included.
        error: relative output error, squared: ``tr(E H E^T) / tr(W H W^T)`` summed over the unit's layers.
        kl: KL divergence of the model's output, nats a token; None if not measured.

    """

    width: str
    stored: int
    error: float
    kl: float | None


@dataclass(frozen=True)
class Unit:
    """Layers that are stored alike.

    Attributes:
        name: the layers' common name, ``model.layers.0.self_attn.{q_proj,k_proj,v_proj}``, or ``...mlp.experts.*``.
        layers: their full names.
        weights: how many weights they have.
        choices: one for each width, in the order of the settings.

    """

    name: str
    layers: tuple[str, ...]
    weights: int
    choices: tuple[Choice, ...]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Unit:
        """Return the unit that ``dataclasses.asdict`` made data of; further keys do not matter."""
        return Unit(
            data["name"], tuple(data["layers"]), data["weights"], tuple(Choice(**choice) for choice in data["choices"])
        )


def unmeasured(decoder: Decoder, plan: Plan, index: int, widths: tuple[Width, ...]) -> list[Unit]:
    """Return a block's units with what they take at each width, and no measures (zeros)."""
    linears = decoder.linears(index)
    units = []
    for group in units_of(decoder, plan, index):
        names = tuple(decoder.name(index, local) for local in group)
        shapes = [linears[local].weight.shape for local in group]
        choices = []
        weights = sum(shape.numel() for shape in shapes)
        for width in widths:
            if width.bits == 16:
                stored = 8 * sum(decoder.source.size_of(f"{name}.weight") for name in names)
                each = stored // weights
            else:
                steps = width.steps_of(plan.steps[names[0]], names, [shape[1] for shape in shapes])
                stored = sum(stored_bits(step, shape) for step, shape in zip(steps, shapes, strict=True))
                each = width.bits
            choices.append(Choice(str(width), width.stored(stored, weights, each), 0.0, 0.0))
        units.append(Unit(common_name(names), names, weights, tuple(choices)))
    return units


def units_of(decoder: Decoder, plan: Plan, index: int) -> list[list[str]]:
    """Return the local names of a block's layers that the plan changes, those that vLLM merges together."""
    return families(name for name in decoder.linears(index) if decoder.name(index, name) in plan.changed)


def stored_bits(step: RoundStep, shape: torch.Size) -> int:
    """Return the storage of a layer in bits; zero-points count 8, as in the format of ours that mixes are stored in."""
    return step.bulk_form.stored_bits(*shape)


def common_name(names: tuple[str, ...]) -> str:
    """Return ``a.b.{c,d}`` for ``a.b.c`` and ``a.b.d``, ``a.experts.*`` for experts; a single name as it is."""
    if len(names) == 1:
        return names[0]
    if experts := experts_of(names):
        return experts
    return f"{names[0].rpartition('.')[0]}.{{{','.join(name.rpartition('.')[2] for name in names)}}}"
