"""Loads linear layers in the format of ours (``quant_methods/formats/native_format.py``) into vLLM, and runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.formats.form import Form
from quant_methods.formats.native_format import unpack
from quant_methods.formats.parts.part import Draw
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.formats.shards import cut, share
from vllm_ext.compat import (
    LinearMethodBase,
    QKVParallelLinear,
    current_platform,
    get_current_vllm_config,
    set_weight_attrs,
)
from vllm_ext.part_kernels import check_served
from vllm_ext.served_linear import serve

QKV = {"q": 0, "k": 1, "v": 2}
"""vLLM's names of the parts of a merged attention projection, in their order."""

DUMMY_SIZE = 1e-3
"""Of a weight of ``--load-format dummy``: vLLM draws its own evenly from -1e-3 to 1e-3."""


class ParetoLinearMethod(LinearMethodBase):
    """Loads a linear layer, or several that vLLM merges, and runs them.

    Args:
        forms: checkpoint name to form of each, in vLLM's order.

    """

    def __init__(self, forms: dict[str, Form]) -> None:
        self.forms = forms

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the names that a checkpoint's tensors come under. Whole tensors are kept until all are there.

        Raises:
            ParetoError: a part of the layer has no kernel on this device.

        """
        # Before gigabytes of weights are read.
        for kind in {type(part) for form in self.forms.values() for part in form.parts}:
            check_served(kind.part, torch.device(current_platform.device_type))
        if len(self.forms) not in (1, len(output_partition_sizes)):
            raise ParetoError(f"{layer.prefix}: vLLM merges {len(output_partition_sizes)} layers into it")
        layer.pareto_pieces = {}
        layer.pareto_inputs = share(input_size, input_size_per_partition, layer.tp_rank, layer.tp_size)
        layer.pareto_outputs = list(output_partition_sizes)
        layer.pareto_dtype = params_dtype
        tensors = {name: stored for form in self.forms.values() for name, stored in form.tensors(0, 0).items()}
        for name, stored in sorted(tensors.items()):
            parameter = nn.Parameter(torch.empty(0, dtype=stored.dtype or params_dtype), requires_grad=False)

            def load(
                parameter: nn.Parameter,
                loaded: Tensor,
                shard: int | str | tuple[int, ...] | None = None,
                *,
                name: str = name,
            ) -> None:
                layer.pareto_pieces.setdefault(_position(shard), {})[name] = loaded

            set_weight_attrs(parameter, {"weight_loader": load})
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Cut this rank's part out of what was loaded, and make what multiplies by it.

        Raises:
            ParetoError: a tensor is missing or damaged, or ranks would cut a group.

        """
        device = next(layer.parameters()).device
        dummy = get_current_vllm_config().load_config.load_format == "dummy"
        for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
            delattr(layer, name)
        linears: list[QuantizedLinear] = []
        activations: list[str] = []
        draw = Draw(DUMMY_SIZE, layer.pareto_dtype, device)
        whole = _whole_sizes(layer)
        for position, (name, form) in enumerate(self.forms.items()):
            tensors = {local: tensor.to(device) for local, tensor in layer.pareto_pieces.pop(position, {}).items()}
            if dummy:
                size = layer.pareto_outputs[position] if len(self.forms) > 1 else sum(layer.pareto_outputs)
                low, high = layer.pareto_inputs
                linears.append(form.random(size, high - low, draw))
                activations.append(form.activations)
                continue
            linear = unpack(name, tensors, form)
            # A layer of the model's own that is merged already is cut like the layers that vLLM merges.
            positions = [position] if len(self.forms) > 1 else range(len(layer.pareto_outputs))
            start = 0
            for part in positions:
                size = layer.pareto_outputs[part]
                full = linear.shape[0] if len(positions) == 1 else whole[part]
                low, high = share(full, size, layer.tp_rank, layer.tp_size)
                linears.append(cut(linear, (start + low, start + high), layer.pareto_inputs))
                activations.append(form.activations)
                start += full
        del layer.pareto_pieces
        layer.served = nn.ModuleList(serve(linears, activations, layer.pareto_dtype))
        # What takes LoRA adapters asks a layer's weight where they shall lie, under one of the names that weights have
        # in vLLM's own formats. This one holds nothing: it only lies where the layer does.
        layer.register_buffer("weight_packed", torch.empty(0, device=device), persistent=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product of inputs [..., in] with the layer, its bias added."""
        parts = [part(x) for part in layer.served]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias


def _position(shard: int | str | tuple[int, ...] | None) -> int:
    """Return which of the merged layers a tensor belongs to."""
    if isinstance(shard, tuple):
        raise ParetoError(f"tensors that hold the merged layers {shard} in one are not read from this format")
    if isinstance(shard, str):
        return QKV[shard]
    return shard or 0


def _whole_sizes(layer: nn.Module) -> list[int]:
    """Return the output channels, of all ranks together, of the layers that vLLM merges into this one."""
    if isinstance(layer, QKVParallelLinear):
        query, key = layer.total_num_heads * layer.head_size, layer.total_num_kv_heads * layer.head_size
        return [query, key, layer.total_num_kv_heads * layer.v_head_size]
    return list(getattr(layer, "output_sizes", []))
