"""Moves scales from a block's linear layers to what feeds them, without changing what the block computes.

Layers that share an input x (a stage, see ``calibrator.py``) may take ``W diag(s)`` if x becomes ``diag(s)^-1 x``.
Where x is a norm's output, the norm's weight is divided by s, and all layers that read the norm take part: in blocks
whose attention and MLP run side by side (Phi-2, Cohere) those of both. Where x is linear in the outputs of another
layer (down in up, o in v unless heads share their values), that layer's rows are divided. The transform steps say what
to scale by.

A norm's weight is stored in the checkpoint's dtype, so it is rounded first, and its layers are scaled by what it was
really divided by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from kv_cache.tf32 import tf32
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.stages import Stage, Statistics, find_stages, statistics_at_once
from quant_methods.handlers import BLOCK_STEPS, TRANSFORMS, ScalingProblem
from quant_methods.patterns import matches
from quant_methods.steps import BlockStep

if TYPE_CHECKING:
    from quant_methods.plan import Plan

# Layers whose output channels become the input channels of another, one by one and linearly.
LINEAR_FEEDS = {"down_proj": "up_proj", "o_proj": "v_proj"}


@dataclass(frozen=True)
class Fold:
    """A stage whose inputs can be divided by scales.

    Attributes:
        position: of the stage in the block.
        stage: its layers.
        producer: the module, by name within the block, whose outputs are divided.
        offset: for a norm, what it adds to its weight before it multiplies by it: 1 in Gemma's, else 0.

    """

    position: int
    stage: Stage
    producer: str
    offset: float = 0.0

    def divided(self, parameter: Tensor, s: Tensor) -> Tensor:
        """Return a parameter of the producer as it has to be, so that outputs are divided by scales [out]."""
        if parameter.dim() == 2:
            return parameter / s[:, None]
        return (parameter + self.offset) / s - self.offset


@dataclass(frozen=True)
class Learned:
    """What a block step learned about rounding a layer.

    Attributes:
        ranges: (scale, zero-point), float32 [out, groups].
        offset: float32 [out, in], to be added to the weight before it is rounded, or None.

    """

    ranges: tuple[Tensor, Tensor]
    offset: Tensor | None = None


class ScaledBlock:
    """A block whose scales are being moved.

    Attributes:
        stages: its linear layers by shared input.
        folds: those of the stages whose inputs can be divided.
        learned: what a step learned about rounding layers, by local name.

    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        index: int,
        block: nn.Module,
        hidden: Tensor,
        plan: Plan,
        original: tuple[nn.Module, Tensor] | None = None,
        say: Callable[[str], None] = lambda what: None,
    ) -> None:
        """Watch what a block computes.

        Args:
            decoder: whose block it is.
            index: the block's index.
            block: its weights are loaded.
            hidden: the hidden states that enter it, float32 [sequences, length, width].
            plan: says which layers will be quantized, and how.
            original: the original block and the original model's hidden states.
            say: told what happens now.

        """
        self.decoder, self.index, self.block, self.hidden, self.plan = decoder, index, block, hidden, plan
        self.original, self.say = original, say
        self.stages = find_stages(decoder, index, block, hidden)
        self.folds = find_folds(decoder, index, block, hidden, self.stages)
        self.learned: dict[str, Learned] = {}
        self._batch = hidden[:1].to(decoder.device)
        self._before = self._output()
        self._changed: set[str] = set()

    def _output(self) -> Tensor:
        """Return what the block puts out on one sequence; not in TF32, whose rounding differs with the scales."""
        with tf32(False):
            return self.decoder.run(self.index, self.block, self._batch)

    def names(self, fold: Fold) -> list[str]:
        """Return the full names of the layers that a fold's scales multiply."""
        return [self.decoder.name(self.index, name) for name in fold.stage.names]

    def wanted(self, fold: Fold, targets: tuple[str, ...]) -> bool:
        """Return whether all layers of a fold are targets, and some will be quantized."""
        names = self.names(fold)
        return all(matches(name, targets) for name in names) and any(name in self.plan.steps for name in names)

    def statistics(self, folds: list[Fold], tokens: int | None = None) -> dict[int, Statistics]:
        """Return the statistics of folds' inputs by the position of their stage.

        Scales of one fold do not change another's inputs, so one pass before any is divided serves all.

        Args:
            folds: which.
            tokens: about how many are looked at, in whole sequences evenly spread over the calibration set; None: all.

        """
        positions = [fold.position for fold in folds]
        count = self.hidden.shape[0] * self.hidden.shape[1]
        hidden = self.hidden[:: max(count // tokens, 1) if tokens else 1]
        return statistics_at_once(self.decoder, self.index, self.block, hidden, stages=self.stages, positions=positions)

    def problem(self, fold: Fold, seen: Statistics) -> ScalingProblem:
        """Return what a transform step gets to see of a fold."""
        assert seen.ranges is not None
        steps = [self.plan.steps.get(name) for name in self.names(fold)]
        ranges = seen.ranges
        return ScalingProblem(self._weights(fold), steps, seen.hessian, ranges.largest, ranges.mean, ranges.sample)

    def target(self) -> Tensor:
        """Return what the block should put out: what the original does, float32 [sequences, length, width]."""
        block, hidden = self.original or (self.block, self.hidden)
        target = hidden.clone()
        self.decoder.advance(self.index, block, target)
        return target

    def divide(self, fold: Fold, s: Tensor) -> None:
        """Divide a fold's inputs by scales float32 [in], in place."""
        stored = self.decoder.source.dtype(self.decoder.name(self.index, f"{fold.producer}.weight"))
        producer = self.block.get_submodule(fold.producer)
        divide(producer, self._weights(fold), s, stored, fold.offset)
        self._changed |= {f"{fold.producer}.{local}" for local in producer._parameters}
        self._changed |= {f"{name}.weight" for name in fold.stage.names}

    def _weights(self, fold: Fold) -> list[Tensor]:
        return [self.block.get_submodule(name).weight.data for name in fold.stage.names]

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Return those of the block's tensors that changed and will not be quantized, as they are to be stored.

        Raises:
            ParetoError: the block does not compute what it did: its layers are not fed as their names say.

        """
        decoder, index = self.decoder, self.index
        if not torch.allclose(self._before, self._output(), rtol=1e-3, atol=1e-4 * self._before.abs().max().item()):
            raise ParetoError(
                f"{decoder.name(index, '')[:-1]}: scales moved between its layers changed what it computes; this "
                "model's blocks are not built as Llama's are: use a recipe without transform steps, such as gptq-w4"
            )
        tensors = {}
        state = self.block.state_dict()
        for local in sorted(self._changed):
            full = decoder.name(index, local)
            if full.removesuffix(".weight") not in self.plan.steps and local in state:
                tensors[full] = state[local].to("cpu", decoder.source.dtype(full), copy=True)
                state[local].copy_(tensors[full])
        return tensors


def scale_block(scaled: ScaledBlock) -> dict[str, Tensor]:
    """Carry out a plan's transform steps on a block, in place; return the changed tensors that are stored as they are.

    Raises:
        ParetoError: the block's layers are not fed as their names say.

    """
    for step in scaled.plan.transforms:
        if isinstance(step, BlockStep):
            BLOCK_STEPS[type(step)](step, scaled)
            continue
        scaled.say("scales")
        folds = [fold for fold in scaled.folds if scaled.wanted(fold, step.targets)]
        seen = scaled.statistics(folds, step.tokens) if folds else {}
        for fold in folds:
            scaled.divide(fold, TRANSFORMS[type(step)](step, scaled.problem(fold, seen[fold.position])))
    return scaled.finish()


@torch.no_grad()
def divide(producer: nn.Module, weights: list[Tensor], s: Tensor, stored: torch.dtype, offset: float = 0.0) -> None:
    """Divide a module's outputs by scales, and multiply the input channels of what it feeds by them, in place.

    Args:
        producer: a norm, or a linear layer.
        weights: float32 [out, in] of the layers fed.
        s: float32 [in], positive.
        stored: dtype that the producer's weight is stored in.
        offset: what a norm adds to its weight before it multiplies by it.

    """
    if isinstance(producer, nn.Linear):
        producer.weight.data /= s[:, None]
    else:
        old = producer.weight.data
        new = ((old + offset) / s - offset).to(stored).to(old.dtype)
        kept = (new + offset == 0) | ~torch.isfinite(new)
        s = torch.where(kept, torch.ones_like(s), (old + offset) / (new + offset))
        producer.weight.data = torch.where(kept, old, new)
    if getattr(producer, "bias", None) is not None:
        producer.bias.data /= s
    for weight in weights:
        weight.mul_(s)


@torch.no_grad()
def weight_offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight before it multiplies by it, found by running it with two weights."""
    probe = copy.deepcopy(norm)
    weight = probe.weight
    x = torch.randn((4, len(weight)), generator=torch.Generator().manual_seed(0)).to(weight)
    outputs = []
    for value in (0.0, 1.0):
        weight.fill_(value)
        if getattr(probe, "bias", None) is not None:
            probe.bias.zero_()
        outputs.append(probe(x))
    step = outputs[1] - outputs[0]
    return round(((outputs[0] * step).sum() / (step * step).sum()).item())


def find_folds(decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, stages: list[Stage]) -> list[Fold]:
    """Return the stages of a block whose inputs can be divided, found by watching one forward pass."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    hooks = []
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear):

            def enter(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                inputs[name] = args[0]

            hooks.append(module.register_forward_pre_hook(enter))
        elif weight is not None and weight.dim() == 1:

            def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                outputs[name] = output

            hooks.append(module.register_forward_hook(leave))
    try:
        decoder.run(index, block, hidden[:1].to(decoder.device))
    finally:
        for hook in hooks:
            hook.remove()
    folds: list[Fold] = []
    for position, stage in enumerate(stages):
        if stage.wave is not None:
            continue  # An expert's inputs are some tokens of a norm's output, which all experts and the router read.
        first = stage.names[0]
        producer = next((name for name, output in outputs.items() if output is inputs[first]), None)
        parent, _, local = first.rpartition(".")
        if producer is None and len(stage.names) == 1 and local in LINEAR_FEEDS:
            feeding = f"{parent}.{LINEAR_FEEDS[local]}".removeprefix(".")
            modules = dict(block.named_modules())
            # Heads that share their values (GQA) would need equal scales.
            if feeding in modules and modules[feeding].out_features == modules[first].in_features:
                producer = feeding
        if producer is None:
            continue
        same = next((place for place, fold in enumerate(folds) if fold.producer == producer), None)
        if same is None:
            module = block.get_submodule(producer)
            offset = 0.0 if isinstance(module, nn.Linear) else weight_offset(module)
            folds.append(Fold(position, stage, producer, offset))
        else:
            together = replace(folds[same].stage, names=(*folds[same].stage.names, *stage.names), joins_residual=False)
            folds[same] = replace(folds[same], stage=together)
    return folds
