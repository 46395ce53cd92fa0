"""The model that a checkpoint means, in float32 PyTorch: weights read back, activations rounded as in serving.

What serving computes differs from it by the rounding of arithmetic alone, so it is the oracle for a served checkpoint
and the quickest way to compare recipes. It reads the format of ours (``native_format.py``), compressed-tensors
checkpoints, ours and others' (``pack-quantized`` and ``int-quantized``), and unquantized ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kv_cache.errors import ParetoError
from quant_methods import native_format
from quant_methods.checkpoint import Source, unpack_linear
from quant_methods.grid import Grid, round_tokens
from quant_methods.model_source import read_config
from quant_methods.native_format import ACTIVATION_BITS, QUANT_METHOD, NativeConfig
from quant_methods.quantized import QuantizedLinear


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
    source = Source(checkpoint)
    reader = _reader(checkpoint, source, quantization) if quantization else None
    settings = AutoConfig.from_pretrained(checkpoint)
    if quantization:
        del settings.quantization_config
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for local in module._parameters:
            full = f"{name}.{local}"
            quantized = None
            if reader is not None and local == "weight" and isinstance(module, nn.Linear):
                quantized = reader.layer(name, module)
            if quantized is not None:
                linear, bits = quantized
                state[full] = linear.read()
                if bits is not None:
                    _round_inputs(module, linear, bits)
            elif full in source:
                state[full] = source.read(full).float()
    if reader is not None:
        reader.finish()
    missing, unexpected = model.load_state_dict(state, strict=False)
    head = model.get_output_embeddings() if settings.tie_word_embeddings else None
    tied = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if absent := [*sorted(set(missing) - tied), *unexpected]:
        raise ParetoError(f"{checkpoint}: the checkpoint lacks {absent[0]}")
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


class _Reader(Protocol):
    """A format's layers."""

    def layer(self, name: str, module: nn.Linear) -> tuple[QuantizedLinear, int | None] | None:
        """Return a quantized layer and what its inputs are rounded to, in bits; None for an unquantized layer."""
        ...

    def finish(self) -> None:
        """Raise unless every quantized layer was asked for."""
        ...


def _reader(checkpoint: Path, source: Source, config: dict[str, Any]) -> _Reader:
    method = config.get("quant_method")
    if method == QUANT_METHOD:
        return _Native(source, NativeConfig.parse(config))
    if method == "compressed-tensors":
        return _CompressedTensors(source, config)
    raise ParetoError(
        f"{checkpoint}: quantized by {method!r}; expected compressed-tensors, {QUANT_METHOD}, or no quantization"
    )


class _Native:
    """A checkpoint in the format of ours."""

    def __init__(self, source: Source, config: NativeConfig) -> None:
        self.source, self.forms = source, config.forms
        self.locals: dict[str, list[str]] = {}
        for full in source.entries:
            module, _, local = full.rpartition(".")
            if local != "bias":
                self.locals.setdefault(module, []).append(local)
        self.unread = set(self.forms)

    def layer(self, name: str, module: nn.Linear) -> tuple[QuantizedLinear, int | None] | None:
        """Return a layer; see :class:`_Reader`."""
        if (form := self.forms.get(name)) is None:
            return None
        self.unread.remove(name)
        tensors = {local: self.source.read(f"{name}.{local}") for local in self.locals.get(name, [])}
        return native_format.unpack(name, tensors, form), ACTIVATION_BITS[form.activations]

    def finish(self) -> None:
        """Refuse layers that the model does not have; see :class:`_Reader`."""
        if self.unread:
            raise ParetoError(
                f"{self.source.dir}: the model has no linear layer {min(self.unread)}, which is quantized"
            )


class _CompressedTensors:
    """A compressed-tensors checkpoint."""

    def __init__(self, source: Source, config: dict[str, Any]) -> None:
        self.source = source
        self.ignore, self.groups = config.get("ignore") or [], list(config["config_groups"].values())

    def layer(self, name: str, module: nn.Linear) -> tuple[QuantizedLinear, int | None] | None:
        """Return a layer; see :class:`_Reader`."""
        if (group := self._group(name, module)) is None:
            return None
        return _compressed_tensors_layer(self.source, name, group), _input_bits(name, group)

    def finish(self) -> None:
        """Do nothing: targets may be classes, which the model need not have."""

    def _group(self, name: str, module: nn.Module) -> dict[str, Any] | None:
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


def _compressed_tensors_layer(source: Source, name: str, group: dict[str, Any]) -> QuantizedLinear:
    settings = group["weights"]
    grid = Grid(settings["num_bits"], settings.get("group_size") or -1, settings["symmetric"])
    parts = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    tensors = {f"{name}.{part}": source.read(f"{name}.{part}") for part in parts if f"{name}.{part}" in source}
    if settings["type"] != "int" or f"{name}.weight_scale" not in tensors:
        raise ParetoError(f"{name}: stored as {settings['type']}, {group.get('format')}; expected integers with scales")
    if f"{name}.weight_g_idx" in tensors:
        raise ParetoError(f"{name}: stored with permuted groups (g_idx), which this does not read")
    return unpack_linear(name, tensors, grid)


def _input_bits(name: str, group: dict[str, Any]) -> int | None:
    """Return the bits that a group rounds activations to."""
    settings = group.get("input_activations")
    if settings is None:
        return None
    expected = {"type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
    if any(settings[key] != value for key, value in expected.items()):
        raise ParetoError(f"{name}: activations are quantized as {settings}; expected symmetric integers per token")
    return int(settings["num_bits"])


def _round_inputs(module: nn.Module, linear: QuantizedLinear, bits: int) -> None:
    """Let a linear layer round its inputs as serving does: for the bulk, without the columns kept apart."""
    index = linear.columns.index.long() if linear.columns is not None else None
    beside = linear.read() - linear.bulk() if linear.beside else None

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        bulk = x if index is None else x.index_fill(-1, index, 0)
        rounded = round_tokens(bulk, bits)
        if beside is not None:
            # What the layer adds beside its bulk is for the inputs as they are; the module multiplies all by `rounded`.
            module.beside = nn.functional.linear(x - rounded, beside.to(x))
        return (rounded, *args[1:])

    def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + module.beside

    module.register_forward_pre_hook(enter)
    if beside is not None:
        module.register_forward_hook(leave)
