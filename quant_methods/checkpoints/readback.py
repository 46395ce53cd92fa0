"""A checkpoint's weights as transformers' model has them, whatever way they are stored.

- Quantized layers are read back (``stored_layers.py`` says which formats), float8 ones and MXFP4's experts too.
- Where the model keeps in one parameter what the checkpoint keeps in several (mixtures of experts), or under another
  name, they are joined as transformers' own loader joins them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.stored_layers import StoredLayers, stored_layers
from quant_methods.formats.foreign_formats import unpack_mxfp4
from quant_methods.formats.sparse_formats import BITMASK_TENSORS, ROW_OFFSETS, bitmask_tensors
from quant_methods.model_source import quantization_settings

FLOAT8 = "fp8"
"""What transformers calls the layout of float8 weights with scales of blocks (DeepSeek, Qwen)."""
MXFP4 = "mxfp4"
"""What transformers calls the layout of gpt-oss' experts, NAME_blocks and NAME_scales for a parameter NAME."""


class _OnDevice(Source):
    """A checkpoint whose tensors are read straight to a device, where unpacking them is quick.

    Its files stay open. Tensors on the CPU are the files' own memory: not to be written to.
    """

    def __init__(self, model_dir: Path, device: torch.device) -> None:
        super().__init__(model_dir)
        self.device = device
        self.files: dict[Path, Any] = {}

    def stored(self, name: str) -> Tensor:
        if name not in self.entries:
            raise ParetoError(f"{self.dir}: the checkpoint lacks {name}")
        path = self.entries[name][0]
        if path not in self.files:
            self.files[path] = safe_open(path, framework="pt")
        return self.files[path].get_tensor(name).to(self.device)


@dataclass
class _Parameter:
    """Where a parameter comes from.

    Attributes:
        stored: the stored tensors' names, and which of the converter's patterns each matched.
        converter: transformers' ``WeightConverter`` that joins them; None: there is one, and it is the parameter.
        key: what the converter knows the parameter by.

    """

    stored: list[tuple[str, str]]
    converter: Any = None
    key: str = ""


class ReadBack(Source):
    """A checkpoint seen through a model: ``read`` takes the model's names and returns what its parameters are.

    Reading is all that it is for; what else a Source says is said of the files.
    """

    def __init__(self, model_dir: Path, model: Any, device: torch.device) -> None:
        """Find out where each parameter lies.

        Args:
            model_dir: the checkpoint.
            model: transformers' model of its configuration; its weights may lie on the meta device.
            device: where to read to.

        Raises:
            ParetoError: the checkpoint is quantized in a way that this does not read.

        """
        self.plain = _OnDevice(model_dir, device)
        self.dir, self.entries, self.model = model_dir, self.plain.entries, model
        self.settings = quantization_settings(model_dir)
        self.layers: StoredLayers | None = None
        if self.settings and self.settings.get("quant_method") not in (FLOAT8, MXFP4):
            self.layers = stored_layers(self.plain, self.settings)
        self.quantized = self.layers.names() if self.layers is not None else set()
        self.parameters = self._find()

    def __contains__(self, name: str) -> bool:
        """Return whether the checkpoint has a parameter of the model's."""
        return name in self.parameters

    def read(self, name: str) -> Tensor:
        """Return a parameter, on the device, in a floating-point dtype.

        Raises:
            ParetoError: the checkpoint does not have it, or not in a form that can be read.

        """
        if name not in self.parameters:
            raise ParetoError(f"{self.dir}: the checkpoint lacks {name}")
        found = self.parameters[name]
        if found.converter is None:
            return self._stored(found.stored[0][0])
        converter = copy.deepcopy(found.converter)
        for stored, pattern in found.stored:
            converter.add_tensor(found.key, stored, pattern, self._stored(stored))
        made = converter.convert(found.key, model=self.model, config=self.model.config)
        tensor = made[name]
        return tensor[0] if isinstance(tensor, list) else tensor

    def _names(self) -> list[str]:
        """Return the stored tensors' names, as if nothing were quantized."""
        names = [f"{module}.weight" for module in self.quantized]
        for name in self.entries:
            if self._mxfp4(name.removesuffix("_blocks")):
                names.append(name.removesuffix("_blocks"))
                continue
            module, _, local = name.rpartition(".")
            if local in (*BITMASK_TENSORS, ROW_OFFSETS) and bitmask_tensors(f"{module}.weight", self.entries):
                if local == "bitmask" and module not in self.quantized:
                    names.append(f"{module}.weight")
                continue
            if local == "bias" or (module not in self.quantized and not local.startswith(("weight_scale", "input_"))):
                names.append(name)
        return names

    def _find(self) -> dict[str, _Parameter]:
        wanted = set(self.model.state_dict())
        names = self._names()
        found = {name: _Parameter([(name, name)]) for name in names if name in wanted}
        if wanted <= set(found):
            return found
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                dot_natural_key,
                rename_source_key,
            )
        except ImportError:  # another version of transformers: what has another layout is reported as missing
            return found
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        shapes = self.model.state_dict()
        for name in sorted(set(names) - set(found), key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, shapes)
            if key not in wanted:
                continue
            if pattern is None:
                found.setdefault(key, _Parameter([(name, name)]))
                continue
            rule = of_pattern[pattern]
            # A rule that makes several parameters of its tensors is known by the first.
            for target in rule.target_patterns:
                made = key.replace(rule.target_patterns[0], target, 1)
                if made in wanted:
                    found.setdefault(made, _Parameter([], rule, key)).stored.append((name, pattern))
        return found

    def _stored(self, name: str) -> Tensor:
        """Return a stored tensor, a quantized one read back."""
        module, _, local = name.rpartition(".")
        if local == "weight" and module in self.quantized and not self._float8(name):
            assert self.layers is not None
            stored = self.layers.layer(module, self._linear(module))
            if stored is None:
                raise ParetoError(f"{self.dir}: {module} is stored as a quantized layer, and its settings leave it out")
            return stored[0].read()
        if self._mxfp4(name):
            # The parameter has a matrix for each expert too, but its rows are the input channels.
            return unpack_mxfp4(*(self.plain.read(f"{name}_{part}") for part in ("blocks", "scales"))).mT
        tensor = self.plain.read(name)
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor
        if not self._float8(name):
            raise ParetoError(
                f"{self.dir}: {name} is {self.entries[name][1]['dtype']}, which is no weight that can be read"
            )
        return self._scaled(module, tensor.float())

    def _mxfp4(self, name: str) -> bool:
        return {f"{name}_blocks", f"{name}_scales"} <= self.entries.keys()

    def _float8(self, name: str) -> bool:
        where = name if name in self.entries else f"{name.removesuffix('.weight')}.compressed"
        return where in self.entries and str(self.entries[where][1]["dtype"]).startswith("F8_E4M3")

    def _scaled(self, module: str, weight: Tensor) -> Tensor:
        """Multiply a weight [out, in] by its scales: one, one of each row, or one of each block."""
        local = next((x for x in ("weight_scale", "weight_scale_inv") if f"{module}.{x}" in self.entries), None)
        if local is None:
            raise ParetoError(f"{self.dir}: {module} is stored in 8-bit floating point and has no scale")
        scale = self.plain.read(f"{module}.{local}").float()
        if scale.numel() == 1:
            return weight * scale.reshape(())
        if local == "weight_scale" and scale.numel() == len(weight):
            return weight * scale.reshape(-1, 1)
        if local == "weight_scale_inv" and scale.dim() == 2:
            sizes = (self.settings or {}).get("weight_block_size") or (128, 128)
            spread = scale.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
            if spread.shape[0] >= weight.shape[0] and spread.shape[1] >= weight.shape[1]:
                return weight * spread[: weight.shape[0], : weight.shape[1]]
        raise ParetoError(
            f"{self.dir}: scales {list(scale.shape)} of {module} do not belong to a weight of {list(weight.shape)}"
        )

    def _linear(self, module: str) -> nn.Linear:
        """Return the linear layer of that name, or one of its shape where the model joins it with others."""
        try:
            found = self.model.get_submodule(module)
        except AttributeError:
            found = None
        if isinstance(found, nn.Linear):
            return found
        width = 1
        if f"{module}.qweight" in self.entries:
            rows = self.entries[f"{module}.qweight"][1]["shape"][0]
            settings = self.settings or {}
            packed = settings.get("quant_method") == "gptq"
            width = rows * 32 // int(settings.get("bits", 4)) if packed else rows
        return nn.Linear(width, 1, device="meta")


__all__ = ["ReadBack"]
