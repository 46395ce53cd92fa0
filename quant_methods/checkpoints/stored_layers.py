"""Quantized layers of a checkpoint as its format stores them: ours, compressed-tensors, GPTQ and AWQ of any tool."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source, unpack_linear
from quant_methods.formats import native_format
from quant_methods.formats.foreign_formats import GPTQ_BITS, regrouped, unpack_awq, unpack_gptq
from quant_methods.formats.form import ACTIVATION_BITS
from quant_methods.formats.grid import Grid, round_static, round_tokens
from quant_methods.formats.native_format import QUANT_METHOD, NativeConfig
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.formats.sparse_formats import MARLIN_TENSORS, is_marlin, is_sparse, unpack_marlin_24

Rounding = Callable[[Tensor], Tensor]
"""Rounds a layer's inputs [..., channels] as serving does, and reads them back."""


class StoredLayers(Protocol):
    """A format's layers."""

    def names(self) -> set[str]:
        """Return the names of the quantized layers, as far as the stored tensors say them."""
        ...

    def layer(self, name: str, module: nn.Linear) -> tuple[QuantizedLinear, Rounding | None] | None:
        """Return a quantized layer and how its inputs are rounded (None: not); None for an unquantized layer.

        Raises:
            ParetoError: it is stored in a way that this does not read.

        """
        ...

    def finish(self) -> None:
        """Raise unless every quantized layer was asked for.

        Raises:
            ParetoError: one was not: the model that config.json describes does not have it.

        """
        ...


def stored_layers(source: Source, settings: dict[str, Any]) -> StoredLayers:
    """Return the layers of a quantized checkpoint.

    Args:
        source: the checkpoint.
        settings: its ``quantization_config``.

    Raises:
        ParetoError: it is quantized in a way that this does not read.

    """
    method = settings.get("quant_method")
    readers: dict[Any, Callable[[Source, dict[str, Any]], StoredLayers]] = {
        "compressed-tensors": CompressedTensors,
        QUANT_METHOD: Native,
        "gptq": GPTQ,
        "awq": AWQ,
    }
    if method not in readers:
        raise ParetoError(
            f"{source.dir}: quantized by {method!r}; expected {', '.join(readers)}, or no quantization at all"
        )
    return readers[method](source, settings)


class Native:
    """A checkpoint in the format of ours."""

    def __init__(self, source: Source, settings: dict[str, Any]) -> None:
        self.source, self.forms = source, NativeConfig.parse(settings).forms
        self.locals: dict[str, list[str]] = {}
        for full in source.entries:
            module, _, local = full.rpartition(".")
            if local != "bias":
                self.locals.setdefault(module, []).append(local)
        self.unread = set(self.forms)

    def names(self) -> set[str]:
        """Return the quantized layers' names; see :class:`StoredLayers`."""
        return set(self.forms)

    def layer(self, name: str, module: nn.Linear) -> tuple[QuantizedLinear, Rounding | None] | None:
        """Return a layer; see :class:`StoredLayers`."""
        if (form := self.forms.get(name)) is None:
            return None
        self.unread.discard(name)
        tensors = {local: self.source.read(f"{name}.{local}") for local in self.locals.get(name, [])}
        bits = ACTIVATION_BITS[form.activations]
        rounding = None if bits is None else functools.partial(round_tokens, bits=bits)
        return native_format.unpack(name, tensors, form), rounding

    def finish(self) -> None:
        """Refuse layers that the model does not have; see :class:`StoredLayers`."""
        _refuse_unread(self.source, self.unread)


def _refuse_unread(source: Source, unread: set[str]) -> None:
    if unread:
        raise ParetoError(f"{source.dir}: the model has no linear layer {min(unread)}, which is quantized")


class _QWeights:
    """What the layouts with ``qweight`` tensors have in common."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stored = {name.removesuffix(".qweight") for name in source.entries if name.endswith(".qweight")}
        self.unread = set(self.stored)

    def names(self) -> set[str]:
        """Return the quantized layers' names; see :class:`StoredLayers`."""
        return set(self.stored)

    def take(self, name: str) -> dict[str, Tensor] | None:
        """Return a layer's tensors by local name, None if it is not quantized."""
        if name not in self.stored:
            return None
        self.unread.discard(name)
        parts = ("qweight", "qzeros", "scales", "g_idx")
        tensors = {part: self.source.read(f"{name}.{part}") for part in parts if f"{name}.{part}" in self.source}
        if absent := {"qweight", "qzeros", "scales"} - set(tensors):
            raise ParetoError(f"{self.source.dir}: {name} has a qweight and no {min(absent)}")
        return tensors

    def finish(self) -> None:
        """Refuse layers that the model does not have."""
        _refuse_unread(self.source, self.unread)


class GPTQ(_QWeights):
    """A checkpoint of AutoGPTQ, GPTQModel or another tool of that family."""

    def __init__(self, source: Source, settings: dict[str, Any]) -> None:
        super().__init__(source)
        layout = settings.get("checkpoint_format", "gptq")
        # AutoGPTQ wrote Marlin's own layout with this flag before there was a name for layouts.
        if settings.get("is_marlin_format"):
            layout = "marlin"
        if layout not in ("gptq", "gptq_v2"):
            raise ParetoError(f"{source.dir}: checkpoint_format {layout!r}; expected gptq or gptq_v2")
        self.zero_offset = 1 if layout == "gptq" else 0

    def layer(self, name: str, module: nn.Linear) -> tuple[QuantizedLinear, Rounding | None] | None:
        """Return a layer; see :class:`StoredLayers`."""
        if (tensors := self.take(name)) is None:
            return None
        # GPTQModel's `dynamic` gives layers bits of their own; the shapes say them in any case.
        bits, rest = divmod(32 * tensors["qweight"].shape[0], module.in_features)
        if rest or bits not in GPTQ_BITS:
            raise ParetoError(
                f"{name}: a qweight of {tensors['qweight'].shape[0]} rows for {module.in_features} input channels; "
                f"expected codes of {', '.join(map(str, GPTQ_BITS))} bits"
            )
        g_idx = tensors.get("g_idx")
        codes = unpack_gptq(tensors["qweight"], tensors["qzeros"], tensors["scales"], g_idx, bits, self.zero_offset)
        return QuantizedLinear(codes), None


class AWQ(_QWeights):
    """A checkpoint of AutoAWQ or another tool of that family."""

    def __init__(self, source: Source, settings: dict[str, Any]) -> None:
        super().__init__(source)
        version = str(settings.get("version", "gemm")).lower()
        bits = settings.get("bits", settings.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise ParetoError(f"{source.dir}: AWQ version {version!r} with {bits} bits; expected gemm with 4")

    def layer(self, name: str, module: nn.Linear) -> tuple[QuantizedLinear, Rounding | None] | None:
        """Return a layer; see :class:`StoredLayers`."""
        if (tensors := self.take(name)) is None:
            return None
        if tensors["qweight"].shape[0] != module.in_features:
            raise ParetoError(
                f"{name}: a qweight of {tensors['qweight'].shape[0]} rows for {module.in_features} input channels; "
                "expected one row for each (AWQ's gemm layout)"
            )
        return QuantizedLinear(unpack_awq(tensors["qweight"], tensors["qzeros"], tensors["scales"])), None


class CompressedTensors:
    """A compressed-tensors checkpoint, ours or another tool's."""

    def __init__(self, source: Source, settings: dict[str, Any]) -> None:
        self.source = source
        is_sparse(settings)  # Refuses sparse weights that are not read.
        # A checkpoint with sparse weights need not have quantized ones.
        self.ignore, self.groups = settings.get("ignore") or [], list((settings.get("config_groups") or {}).values())
        self.settings = settings

    def names(self) -> set[str]:
        """Return the quantized layers' names; see :class:`StoredLayers`."""
        split = (name.rpartition(".") for name in self.source.entries)
        return {module for module, _, local in split if local in ("weight_scale", "scale_packed")}

    def layer(self, name: str, module: nn.Linear) -> tuple[QuantizedLinear, Rounding | None] | None:
        """Return a layer; see :class:`StoredLayers`."""
        if (group := self._group(name, module)) is None:
            return None
        return self._weight(name, group), self._rounding(name, group)

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

    def _weight(self, name: str, group: dict[str, Any]) -> QuantizedLinear:
        if is_marlin(self.settings, group):
            tensors = {part: self.source.read(f"{name}.{part}") for part in MARLIN_TENSORS if self._has(name, part)}
            return QuantizedLinear(unpack_marlin_24(name, tensors))
        settings = group["weights"]
        grid = Grid(settings["num_bits"], settings.get("group_size") or -1, settings["symmetric"])
        parts = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        tensors = {f"{name}.{part}": self.source.read(f"{name}.{part}") for part in parts if self._has(name, part)}
        if settings["type"] != "int" or f"{name}.weight_scale" not in tensors:
            raise ParetoError(
                f"{name}: stored as {settings['type']}, {group.get('format')}; expected integers with scales"
            )
        codes = unpack_linear(name, tensors, grid).part(GridCodes)
        rows, columns = codes.shape
        if codes.scale.numel() == 1:
            codes.scale = codes.scale.reshape(1, 1).expand(rows, 1)
            codes.zero_point = codes.zero_point.reshape(1, 1).expand(rows, 1)
        if codes.scale.shape[0] != rows or columns % codes.scale.shape[1]:
            raise ParetoError(
                f"{name}: scales {list(codes.scale.shape)} do not belong to a weight of {list(codes.shape)}"
            )
        if self._has(name, "weight_g_idx"):
            g_idx = self.source.read(f"{name}.weight_g_idx")
            # -1 is how compressed-tensors marks an order that was never set.
            if not (g_idx < 0).any():
                codes = regrouped(codes, g_idx)
        return QuantizedLinear(codes)

    def _has(self, name: str, part: str) -> bool:
        return f"{name}.{part}" in self.source

    def _rounding(self, name: str, group: dict[str, Any]) -> Rounding | None:
        settings = group.get("input_activations")
        if settings is None:
            return None
        bits = settings["num_bits"]
        kind = {key: settings.get(key) for key in ("type", "dynamic", "strategy")}
        if kind == {"type": "int", "dynamic": True, "strategy": "token"} and settings["symmetric"]:
            return functools.partial(round_tokens, bits=bits)
        if kind == {"type": "int", "dynamic": False, "strategy": "tensor"}:
            scale = self.source.read(f"{name}.input_scale").float()
            zero = torch.zeros_like(scale)
            if self._has(name, "input_zero_point"):
                zero = self.source.read(f"{name}.input_zero_point").float()
            return functools.partial(round_static, scale=scale, zero_point=zero, bits=bits)
        raise ParetoError(
            f"{name}: activations are quantized as {settings}; expected integers, symmetric per token or static per "
            "tensor"
        )


def _targets(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, type(module).__name__)
