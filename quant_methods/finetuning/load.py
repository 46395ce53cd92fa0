"""A checkpoint as a model of transformers that adapters learn over: quantized layers in codes, the rest as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import quiet_transformers
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.stored_layers import stored_layers
from quant_methods.finetuning.coded_linear import CodedLinear
from quant_methods.model_source import quantization_settings


def load_coded(checkpoint: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Return a checkpoint's model, of which nothing learns yet.

    It reads what ``checkpoints/stored_layers.py`` reads: our format with all its parts, compressed-tensors, GPTQ and
    AWQ; and unquantized checkpoints. peft and trl take it as they take any model of transformers.

    Args:
        checkpoint: directory.
        device: torch device.
        dtype: of what is not quantized, and of activations; None: bfloat16 on a GPU, float32 on the CPU.

    Raises:
        ParetoError: it is quantized in a way that this does not read, lacks a tensor, or is a mixture of experts.

    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    source, settings = Source(checkpoint), quantization_settings(checkpoint)
    layers = stored_layers(source, settings) if settings else None
    config = AutoConfig.from_pretrained(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    # Parameters on the meta device take no memory; buffers (rotary frequencies) are computed, since no file has them.
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    loaded: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        stored = layers.layer(name, module) if layers is not None and isinstance(module, nn.Linear) else None
        if stored is not None:
            bias = _read(source, f"{name}.bias", dtype) if module._parameters.get("bias") is not None else None
            model.set_submodule(name, CodedLinear(stored[0], bias, dtype, stored[1]))
            continue
        for local, parameter in list(module._parameters.items()):
            full = f"{name}.{local}" if name else local
            if parameter is None:
                # AutoGPTQ gives every layer a bias, of zeros where the model has none.
                if full in source and source.read(full).any():
                    raise ParetoError(f"{checkpoint}: it has {full}, and the model that config.json describes has none")
                continue
            # Tied parameters are one object, which has one name in the file.
            if full in source:
                loaded[id(parameter)] = nn.Parameter(_read(source, full, dtype), requires_grad=False)
    for name, module in model.named_modules():
        for local, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in loaded:
                full = f"{name}.{local}"
                if parameter.dim() > 2:
                    raise ParetoError(
                        f"{checkpoint}: {full} is that of a mixture of experts, which is not fine-tuned yet"
                    )
                raise ParetoError(f"{checkpoint}: the checkpoint lacks {full}")
            module._parameters[local] = loaded[id(parameter)]
    if layers is not None:
        layers.finish()
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    model.name_or_path = config._name_or_path = str(checkpoint)
    return model.to(device).eval().requires_grad_(False)


def _read(source: Source, name: str, dtype: torch.dtype) -> Tensor:
    tensor = source.read(name)
    # A copy: what is read may be the file's own memory.
    return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
