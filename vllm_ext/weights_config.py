"""Tells vLLM of checkpoints in the format of ours (``quant_methods/formats/native_format.py``); importing registers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kv_cache.errors import ParetoError
from quant_methods.formats.native_format import QUANT_METHOD, NativeConfig
from vllm_ext.compat import QuantizeMethodBase, register_quantization_config
from vllm_ext.own_quantization import OwnConfig


@register_quantization_config(QUANT_METHOD)
class ParetoConfig(OwnConfig):
    """vLLM's view of a checkpoint's ``quantization_config``."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.forms = dict(config.forms)

    def get_name(self) -> str:
        """Return the quantization method's name."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that a model may run in."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ParetoConfig:
        """Read config.json's ``quantization_config``; see ``NativeConfig.parse`` for what is refused."""
        return cls(NativeConfig.parse(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow vLLM where it renames a model's modules."""
        self.forms = hf_to_vllm_mapper.apply_dict(self.forms)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what loads and runs a layer; None for what is no linear layer (embeddings, attention).

        Raises:
            ParetoError: vLLM merges layers of which only some are quantized.

        """
        # Here and not above: the plugin is loaded before vLLM has made up its mind about the platform.
        from vllm_ext.compat import LinearBase, UnquantizedLinearMethod
        from vllm_ext.weights_method import ParetoLinearMethod

        if not isinstance(layer, LinearBase):
            return None
        parent, _, local = prefix.rpartition(".")
        merged = self.packed_modules_mapping.get(local, [local])
        names = [f"{parent}.{name}" if parent else name for name in merged]
        # Some models (Phi-3) have merged layers of their own.
        if prefix in self.forms:
            names = [prefix]
        quantized = {name: self.forms[name] for name in names if name in self.forms}
        if not quantized:
            return UnquantizedLinearMethod()
        if missing := [name for name in names if name not in quantized]:
            raise ParetoError(f"{min(quantized)} is quantized and {missing[0]} is not, and vLLM merges them into one")
        return ParetoLinearMethod(quantized)
