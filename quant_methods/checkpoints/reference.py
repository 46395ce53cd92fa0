"""The model that a checkpoint means, in float32 PyTorch: weights read back, activations rounded as in serving.

What serving computes differs from it by the rounding of arithmetic alone, so it is the oracle for a served checkpoint
and the quickest way to compare recipes. It reads quantized checkpoints, ours and other tools' (``stored_layers.py``
says which), and unquantized ones; of mixtures of experts those that store a tensor for each expert's layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.stored_layers import Rounding, stored_layers
from quant_methods.experts import Experts, unpack_experts
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.model_source import quantization_settings


def load_reference(checkpoint: Path, device: str = "cpu") -> Any:
    """Return a checkpoint's model for evaluation, float32.

    Args:
        checkpoint: directory.
        device: where it will run.

    Raises:
        ParetoError: it is quantized in a way that this does not read.

    """
    quantization = quantization_settings(checkpoint)
    source = Source(checkpoint)
    layers = stored_layers(source, quantization) if quantization else None
    settings = AutoConfig.from_pretrained(checkpoint)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
    quantized = layers.names() if layers is not None else set()
    unpack_experts(model, lambda name: name in source or name.removesuffix(".weight") in quantized)
    for module in model.modules():
        if isinstance(module, Experts):
            module.to_empty(device="cpu")
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for local, parameter in module._parameters.items():
            full = f"{name}.{local}"
            if parameter is None:
                # AutoGPTQ gives every layer a bias, of zeros where the model has none.
                if full in source and source.read(full).any():
                    raise ParetoError(f"{checkpoint}: it has {full}, and the model that config.json describes has none")
                continue
            stored = None
            if layers is not None and local == "weight" and isinstance(module, nn.Linear):
                stored = layers.layer(name, module)
            if stored is not None:
                linear, rounding = stored
                state[full] = linear.read()
                if rounding is not None:
                    round_inputs(module, linear, rounding)
            elif full in source:
                state[full] = source.read(full).float()
    if layers is not None:
        layers.finish()
    missing, unexpected = model.load_state_dict(state, strict=False)
    head = model.get_output_embeddings() if settings.tie_word_embeddings else None
    tied = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if absent := [*sorted(set(missing) - tied), *unexpected]:
        raise ParetoError(f"{checkpoint}: the checkpoint lacks {absent[0]}")
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def round_inputs(module: nn.Module, linear: QuantizedLinear, rounding: Rounding) -> None:
    """Let a linear layer round its inputs as serving does: for the bulk, without the columns kept apart."""
    index = linear.apart()
    beside = linear.read() - linear.read_bulk() if linear.additions else None

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        rounded = rounding(x if index is None else x.index_fill(-1, index.to(x.device), 0))
        if beside is not None:
            # What the layer adds beside its bulk is for the inputs as they are; the module multiplies all by `rounded`.
            module.beside = nn.functional.linear(x - rounded, beside.to(x))
        return (rounded, *args[1:])

    def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + module.beside

    module.register_forward_pre_hook(enter)
    if beside is not None:
        module.register_forward_hook(leave)
