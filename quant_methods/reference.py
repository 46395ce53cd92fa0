"""The model that a checkpoint means, in float32 PyTorch: weights read back, activations rounded as in serving.

What serving computes differs from it by the rounding of arithmetic alone, so it is the oracle for a served checkpoint
and the quickest way to compare recipes. It reads compressed-tensors checkpoints, ours and others' (``pack-quantized``
and ``int-quantized``), and unquantized ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kv_cache.errors import ParetoError
from quant_methods.checkpoint import Source, unpack_linear
from quant_methods.grid import Grid, round_tokens
from quant_methods.model_source import read_config


def load_reference(checkpoint: Path, device: str = "cpu") -> Any:
    """Return a checkpoint's model for evaluation, float32.

    Args:
        checkpoint: directory.
        device: where it will run.

    Raises:
        ParetoError: it is quantized in a way that this does not read.

    """
    config = read_config(checkpoint)
    quantization = config.get("quantization_config")
    if quantization and quantization.get("quant_method") != "compressed-tensors":
        method = quantization.get("quant_method")
        raise ParetoError(f"{checkpoint}: quantized by {method!r}; expected compressed-tensors, or no quantization")
    source = Source(checkpoint)
    settings = AutoConfig.from_pretrained(checkpoint)
    if quantization:
        del settings.quantization_config
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
    groups = _Groups(quantization) if quantization else None
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for local in module._parameters:
            full = f"{name}.{local}"
            group = groups.of(name, module) if groups and local == "weight" and isinstance(module, nn.Linear) else None
            if group is not None:
                state[full] = _weight(source, name, group)
                _round_inputs(module, name, group)
            elif full in source:
                state[full] = source.read(full).float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    head = model.get_output_embeddings() if settings.tie_word_embeddings else None
    tied = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if absent := [*sorted(set(missing) - tied), *unexpected]:
        raise ParetoError(f"{checkpoint}: the checkpoint lacks {absent[0]}")
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


class _Groups:
    """The config_groups of a compressed-tensors checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.ignore, self.groups = config.get("ignore") or [], list(config["config_groups"].values())

    def of(self, name: str, module: nn.Module) -> dict[str, Any] | None:
        """Return the group that a module belongs to."""
        if any(_targets(pattern, name, module) for pattern in self.ignore):
            return None
        # A module's own name comes before its class.
        for by_class in (False, True):
            for group in self.groups:
                targets = [t for t in group["targets"] if (t == type(module).__name__) == by_class]
                if any(_targets(target, name, module) for target in targets):
                    return group
        return None


def _targets(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, type(module).__name__)


def _weight(source: Source, name: str, group: dict[str, Any]) -> Tensor:
    settings = group["weights"]
    grid = Grid(settings["num_bits"], settings.get("group_size") or -1, settings["symmetric"])
    parts = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    tensors = {f"{name}.{part}": source.read(f"{name}.{part}") for part in parts if f"{name}.{part}" in source}
    if settings["type"] != "int" or f"{name}.weight_scale" not in tensors:
        raise ParetoError(f"{name}: stored as {settings['type']}, {group.get('format')}; expected integers with scales")
    if f"{name}.weight_g_idx" in tensors:
        raise ParetoError(f"{name}: stored with permuted groups (g_idx), which this does not read")
    return unpack_linear(name, tensors, grid).read()


def _round_inputs(module: nn.Module, name: str, group: dict[str, Any]) -> None:
    """Let a linear layer round its inputs as serving does."""
    settings = group.get("input_activations")
    if settings is None:
        return
    expected = {"type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
    if any(settings[key] != value for key, value in expected.items()):
        raise ParetoError(f"{name}: activations are quantized as {settings}; expected symmetric integers per token")
    bits = settings["num_bits"]
    module.register_forward_pre_hook(lambda module, args: (round_tokens(args[0], bits), *args[1:]))
