"""Lets vLLM serve other people's sparse checkpoints, whose formats it has dropped; importing registers.

Their weights are expanded while they are read, a weight at a time, before vLLM cuts them for tensor parallelism and
merges them (``quant_methods/formats/sparse_formats.py``). Those of bitmasks then are what vLLM serves in any case:
dense weights of 16 bits, or codes with the quantization that config.json names. Those of marlin-24 keep their 4 or 8
bits: they become codes on a grid, and are loaded as those in the format of ours are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.formats.form import Form
from quant_methods.formats.parts.grid_codes import GridForm
from quant_methods.formats.sparse_formats import MARLIN_24, expanded, has_marlin, is_marlin, is_sparse, without_sparsity
from vllm_ext.compat import QuantizationConfig, QuantizeMethodBase, register_quantization_config
from vllm_ext.own_quantization import OwnConfig

SPARSE = "pareto_sparse"
"""What vLLM knows these checkpoints by; config.json says compressed-tensors."""


@register_quantization_config(SPARSE)
class SparseConfig(OwnConfig):
    """Takes the checkpoints from vLLM's compressed-tensors, and hands them back without their sparsity."""

    def get_name(self) -> str:
        """Return the quantization method's name."""
        return SPARSE

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that a model may run in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> str | None:
        """Return this method's name for a checkpoint with sparse weights, None for any other."""
        return SPARSE if isinstance(hf_quant_cfg, Mapping) and is_sparse(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Return what serves the checkpoint once its weights are expanded.

        Raises:
            ParetoError: a group of marlin-24 has other weights than the format knows.

        """
        settings = without_sparsity(config)
        for where, group in (settings.get("config_groups") or {}).items():
            if is_marlin(settings, group):
                _form(group["weights"], group.get("input_activations"), f"quantization_config: {where}")
        found: QuantizationConfig = _expanded_config().from_config(settings)
        return found

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return nothing: :meth:`from_config` makes what has methods."""
        return None


@functools.cache
def _expanded_config() -> Any:
    # Not above: vLLM imports the quantizations when a model names one, and this file with the names of all of them.
    from vllm_ext.compat import CompressedTensorsConfig, LinearBase, RoutedExperts
    from vllm_ext.weights_method import ParetoLinearMethod

    class ExpandedConfig(CompressedTensorsConfig):
        """compressed-tensors with layers of marlin-24 among its own."""

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            served: list[torch.dtype] = super().get_supported_act_dtypes()
            marlin = any(is_marlin({"format": self.quant_format}, s) for s in self.target_scheme_map.values())
            # As for codes in the format of ours, whose kernels serve these.
            return [dtype for dtype in served if dtype.itemsize == 2] if marlin else served

        def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
            if isinstance(layer, LinearBase):
                scheme = self.get_scheme_dict(layer, prefix)
                if scheme is not None and is_marlin({"format": self.quant_format}, scheme):
                    local = prefix.rpartition(".")[2]
                    form = _form(scheme["weights"].model_dump(), scheme.get("input_activations"), prefix)
                    return ParetoLinearMethod(dict.fromkeys(self.packed_modules_mapping.get(local, [local]), form))
            elif isinstance(layer, RoutedExperts) and MARLIN_24 in (
                self.quant_format,
                *(scheme.get("format") for scheme in self.target_scheme_map.values()),
            ):
                raise ParetoError(
                    f"{prefix}: experts stored as {MARLIN_24} are not read; store them as pack-quantized, or in 16 bits"
                )
            method: QuantizeMethodBase | None = super().get_quant_method(layer, prefix)
            return method

    return ExpandedConfig


def _form(weights: Mapping[str, Any], activations: Any, where: str) -> Form:
    """Return the form of layers whose group of config.json says that they are stored as marlin-24."""
    bits, size = weights.get("num_bits"), weights.get("group_size") or -1
    symmetric, kind = weights.get("symmetric", True), weights.get("type", "int")
    if bits not in (4, 8) or size not in (-1, 128) or not symmetric or kind != "int" or activations is not None:
        raise ParetoError(
            f"{where}: marlin-24 with {bits} bits ({kind}), group_size {size}, symmetric {symmetric} and "
            f"{'quantized' if activations is not None else '16-bit'} activations; expected integers of 4 or 8 bits, "
            "one scale for each output channel or 128 input channels, symmetric, with 16-bit activations"
        )
    return Form((GridForm(bits, size, symmetric=True),))


def expand(weights: Iterator[tuple[str, Tensor]], config: Any) -> Iterator[tuple[str, Tensor]]:
    """Return a checkpoint's tensors as vLLM reads them, with sparse weights expanded.

    Args:
        weights: name and tensor of each.
        config: transformers' configuration of the model.

    """
    for owner in (config, getattr(config, "text_config", None)):
        for name in ("quantization_config", "compression_config"):
            settings = getattr(owner, name, None)
            if isinstance(settings, Mapping) and is_sparse(settings):
                return expanded(weights, marlin=has_marlin(settings))
    return weights
