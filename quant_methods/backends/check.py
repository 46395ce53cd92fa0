"""A look at what another tool wrote: it must read back, be quantized as the recipe says, and be near the original."""

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
from quant_methods.model_source import quantization_settings
from quant_methods.plan import Plan

# What the check of a finished checkpoint runs on, and how far from the original it may be: this many times as far as
# plain rounding to nearest. Every method here exists to be nearer than that.
SEQUENCES, TOKENS = 2, 512
CORRUPT = 2.0
UNCHANGED = 1e-3


def check_layers(target: Path, decoder: Decoder, plan: Plan, backend: Backend) -> tuple[int, float]:
    """Return the number of quantized layers and their stored bits a weight.

    Raises:
        ParetoError: a layer of the plan is not quantized, or one that it ignores is, or a weight is not finite.

    """
    source, settings = Source(target), quantization_settings(target)
    assert settings is not None
    layers = stored_layers(source, settings)
    count, stored, weights = 0, 0, 0
    for name, module in decoder.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        found = layers.layer(name, module)
        if (found is not None) != (name in plan.steps):
            state = "left unquantized" if found is None else "quantized, and the recipe ignores it"
            raise ParetoError(f"{backend.name}: {name} was {state}")
        if found is None:
            continue
        if not torch.isfinite(found[0].read()).all():
            raise ParetoError(f"{backend.name} wrote weights that are not finite: {name}")
        count += 1
        weights += module.in_features * module.out_features
        stored += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for full, (_, entry) in source.entries.items()
            if full.rpartition(".")[0] == name and not full.endswith((".bias", ".weight_shape"))
        )
    layers.finish()
    return count, 8 * stored / weights


@torch.no_grad()
def check_model(
    target: Path, model_dir: Path, plan: Plan, tokens: Tensor, device: str, backend: Backend
) -> tuple[float, float]:
    """Return KL(original || checkpoint) and KL(original || rounded to nearest), nats a token.

    Raises:
        ParetoError: the checkpoint computes what the original does, or something else altogether.

    """
    sample = tokens[:SEQUENCES, :TOKENS].to(device)
    model = load_reference(model_dir, device)
    base = model(sample).logits.log_softmax(-1)
    for name, step in plan.steps.items():
        module = model.get_submodule(name)
        module.weight.copy_(nearest(module.weight, step.grid))
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
            f"{bar:.4f} of plain rounding to nearest (the checkpoint is kept in {target})"
        )
    return found, bar
