"""A look at what another tool wrote: it must read back, be what the recipe says, and be near the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.backends.environment import Backend
from quant_methods.calibration.calibrator import Decoder
from quant_methods.checkpoints import quality
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.reference import load_reference
from quant_methods.checkpoints.stored_layers import stored_layers
from quant_methods.formats.grid import nearest, round_tokens
from quant_methods.methods.pruning import least
from quant_methods.model_source import quantization_settings
from quant_methods.plan import Plan

# What the check of a finished checkpoint runs on, and how far from the original it may be: this many times as far as
# plain rounding to nearest, or dropping the smallest weights. Every method here exists to be nearer than that.
SEQUENCES, TOKENS = 2, 512
# How far a layer's sparsity may be below what was asked for: whole numbers of rows and columns.
SHORT = 0.01
CORRUPT = 2.0
UNCHANGED = 1e-3


def check_layers(target: Path, decoder: Decoder, plan: Plan, backend: Backend) -> tuple[int, float, float | None]:
    """Return the number of changed layers, their stored bits a weight, and the share of zeros where layers are pruned.

    Raises:
        ParetoError: a layer of the plan is not quantized or pruned, or one that it ignores is quantized, or a weight is
            not finite.

    """
    source, settings = Source(target), quantization_settings(target)
    layers = stored_layers(source, settings) if settings else None
    count, stored, weights, zeros = 0, 0, 0, 0
    for name, module in decoder.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        found = layers.layer(name, module) if layers else None
        if (found is not None) != (name in plan.steps):
            state = "left unquantized" if found is None else "quantized, and the recipe ignores it"
            raise ParetoError(f"{backend.name}: {name} was {state}")
        if name not in plan.changed:
            continue
        weight = found[0].read() if found else source.read(f"{name}.weight").float()
        if not torch.isfinite(weight).all():
            raise ParetoError(f"{backend.name} wrote weights that are not finite: {name}")
        count += 1
        weights += weight.numel()
        if name in plan.prunes:
            empty, wanted = int((weight == 0).sum()), plan.prunes[name].sparsity
            if empty < (wanted - SHORT) * weight.numel():
                raise ParetoError(
                    f"{backend.name}: {name} has {empty / weight.numel():.1%} zeros; the recipe asks for {wanted:.0%}"
                )
            zeros += empty
        stored += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for full, (_, entry) in source.entries.items()
            if full.rpartition(".")[0] == name and not full.endswith((".bias", ".weight_shape"))
        )
    if layers:
        layers.finish()
    return count, 8 * stored / weights, zeros / weights if plan.prunes else None


@torch.no_grad()
def check_model(
    target: Path, model_dir: Path, plan: Plan, tokens: Tensor, device: str, backend: Backend
) -> tuple[float, float]:
    """Return KL(original || checkpoint) and KL(original || pruned by size and rounded to nearest), nats a token.

    Raises:
        ParetoError: the checkpoint computes what the original does, or something else altogether.

    """
    sample = tokens[:SEQUENCES, :TOKENS].to(device)
    model = load_reference(model_dir, device)
    base = model(sample).logits.log_softmax(-1)
    for name, prune in plan.prunes.items():
        module = model.get_submodule(name)
        module.weight.masked_fill_(least(module.weight.abs(), prune), 0)
    for name, step in plan.steps.items():
        module = model.get_submodule(name)
        kept = module.weight != 0
        module.weight.copy_(nearest(module.weight, step.grid))
        if name in plan.prunes:
            module.weight.mul_(kept)
        if step.activations == "int8":
            module.register_forward_pre_hook(lambda module, args: (round_tokens(args[0], 8), *args[1:]))

    def measured(model: Any) -> float:
        found = model(sample).logits.log_softmax(-1)
        return float(quality.divergence(base, found).mean())

    bar = measured(model)
    del model
    found = measured(load_reference(target, device))
    if not found >= UNCHANGED * bar:
        raise ParetoError(f"{backend.name} changed nothing: the checkpoint computes what the original does")
    if not found <= CORRUPT * bar:
        raise ParetoError(
            f"{backend.name} wrote corrupt weights: KL to the original {found:.4f} on calibration tokens, against "
            f"{bar:.4f} of doing without any method (the checkpoint is kept in {target})"
        )
    return found, bar
