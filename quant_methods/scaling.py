"""Moves scales from a block's linear layers to what feeds them, without changing what the block computes.

Layers that share an input x (a stage, see ``calibrator.py``) may take ``W diag(s)`` if x becomes ``diag(s)^-1 x``.
Where x is a norm's output, the norm's weight is divided by s; where it is linear in the outputs of another layer (down
in up, o in v unless heads share their values), that layer's rows are. The transform steps say what to scale by.

A norm's weight is stored in the checkpoint's dtype, so it is rounded first, and its layers are scaled by what it was
really divided by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.calibrator import Decoder, Stage
from quant_methods.plan import Plan, matches
from quant_methods.recipe import TRANSFORMS, ScalingProblem

# Layers whose output channels become the input channels of another, one by one and linearly.
LINEAR_FEEDS = {"down_proj": "up_proj", "o_proj": "v_proj"}


@dataclass(frozen=True)
class Fold:
    """A stage whose inputs can be divided by scales.

    Attributes:
        position: of the stage in the block.
        stage: its layers.
        producer: the module, by name within the block, whose outputs are divided.

    """

    position: int
    stage: Stage
    producer: str


@torch.no_grad()
def scale_block(decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, plan: Plan) -> dict[str, Tensor]:
    """Carry out a plan's transform steps on a block, in place.

    Args:
        decoder: whose block it is.
        index: the block's index.
        block: its weights are loaded.
        hidden: the hidden states that enter it, float32 [sequences, length, width].
        plan: has the steps, and says which layers will be quantized, and how.

    Returns:
        Those of the block's tensors that changed and will not be quantized, by full name, as they are to be stored.

    Raises:
        ParetoError: the block's layers are not fed as their names say.

    """
    stages = decoder.stages(index, block, hidden)
    folds = find_folds(decoder, index, block, hidden, stages)
    batch = next(decoder.batches(hidden))[1]
    before = decoder.run(index, block, batch)
    changed: set[str] = set()
    for step in plan.transforms:
        for fold in folds:
            names = [decoder.name(index, name) for name in fold.stage.names]
            weight_steps = [plan.steps.get(name) for name in names]
            if not all(matches(name, step.targets) for name in names) or not any(weight_steps):
                continue
            seen = decoder.statistics(index, block, hidden, stages=stages, position=fold.position, ranges=True)
            assert seen.ranges is not None
            weights = [block.get_submodule(name).weight.data for name in fold.stage.names]
            problem = ScalingProblem(
                weights, weight_steps, seen.hessian, seen.ranges.largest, seen.ranges.mean, seen.ranges.sample
            )
            stored = decoder.source.dtype(decoder.name(index, f"{fold.producer}.weight"))
            divide(block.get_submodule(fold.producer), weights, TRANSFORMS[type(step)](step, problem), stored)
            changed |= {f"{fold.producer}.{local}" for local in block.get_submodule(fold.producer)._parameters}
            changed |= {f"{name}.weight" for name in fold.stage.names}
    after = decoder.run(index, block, batch)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4 * before.abs().max().item()):
        raise ParetoError(
            f"{decoder.name(index, '')[:-1]}: scales moved between its layers changed what it computes; this model's "
            "blocks are not built as Llama's are: use a recipe without transform steps"
        )
    tensors = {}
    state = block.state_dict()
    for local in sorted(changed):
        full = decoder.name(index, local)
        if full.removesuffix(".weight") not in plan.steps and local in state:
            tensors[full] = state[local].to("cpu", decoder.source.dtype(full), copy=True)
            state[local].copy_(tensors[full])
    return tensors


def divide(producer: nn.Module, weights: list[Tensor], s: Tensor, stored: torch.dtype) -> None:
    """Divide a module's outputs by scales, and multiply the input channels of what it feeds by them, in place.

    Args:
        producer: a norm, or a linear layer.
        weights: float32 [out, in] of the layers fed.
        s: float32 [in], positive.
        stored: dtype that the producer's weight is stored in.

    """
    if isinstance(producer, nn.Linear):
        producer.weight.data /= s[:, None]
    else:
        old = producer.weight.data
        new = (old / s).to(stored).to(old.dtype)
        kept = (new == 0) | ~torch.isfinite(new)
        s = torch.where(kept, torch.ones_like(s), old / new)
        producer.weight.data = torch.where(kept, old, new)
    if getattr(producer, "bias", None) is not None:
        producer.bias.data /= s
    for weight in weights:
        weight.mul_(s)


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
        decoder.run(index, block, next(decoder.batches(hidden))[1])
    finally:
        for hook in hooks:
            hook.remove()
    folds = []
    for position, stage in enumerate(stages):
        first = stage.names[0]
        producer = next((name for name, output in outputs.items() if output is inputs[first]), None)
        parent, _, local = first.rpartition(".")
        if producer is None and len(stage.names) == 1 and local in LINEAR_FEEDS:
            feeding = f"{parent}.{LINEAR_FEEDS[local]}".removeprefix(".")
            modules = dict(block.named_modules())
            # Heads that share their values (GQA) would need equal scales.
            if feeding in modules and modules[feeding].out_features == modules[first].in_features:
                producer = feeding
        if producer is not None:
            folds.append(Fold(position, stage, producer))
    return folds
