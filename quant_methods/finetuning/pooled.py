"""Adapters that see one number of each group of inputs, so that zero-points hold all that they learn (QA-LoRA).

Xu et al., "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models" (2023),
https://arxiv.org/abs/2309.14717, section 3.3: what such an adapter adds to a weight is the same number for all inputs
of a group, as a zero-point is. There zero-points become floating-point numbers; here they stay the integers that
kernels read. So the change counts in steps of the grid and is rounded while it is learnt, gradients passing through the
rounding as if it were not there (``training/tuned_model.py``): the merged layer computes what it did in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

from kv_cache.errors import ParetoError
from quant_methods.finetuning.coded_linear import CodedLinear
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.training.tuned_model import straight

if TYPE_CHECKING:
    from peft import LoraConfig


def use_pooled(config: LoraConfig) -> LoraConfig:
    """Let peft put pooled adapters on coded layers; returns the configuration, which says so to whoever merges.

    Args:
        config: of the adapter; without DoRA, whose magnitudes no zero-point holds.

    Raises:
        ParetoError: the configuration asks for what zero-points cannot hold.

    """
    if config.use_dora:
        raise ParetoError("pooled adapters merge into zero-points, which hold no magnitudes; leave DoRA out")
    if config.init_lora_weights is not True:
        raise ParetoError("pooled adapters start at no change; leave the initialization of LoRA weights as it is")
    # Peft's own word for pooled adapters; the size of groups is each layer's own, whatever the configuration says.
    config.use_qalora = True
    config._register_custom_module({CodedLinear: PooledLora})
    return config


def check_pools(name: str, linear: QuantizedLinear) -> GridCodes:
    """Return the codes whose zero-points take a pooled adapter.

    Args:
        name: the layer's, for errors.
        linear: the layer.

    Raises:
        ParetoError: its weight has none.

    """
    found = linear.get(GridCodes)
    if found is None:
        raise ParetoError(f"{name}: pooled adapters need codes on a grid, and this layer has {linear.bulk.what}")
    if found.symmetric:
        raise ParetoError(
            f"{name}: its grid is symmetric and stores no zero-points that a pooled adapter could move; compress with "
            "zero-points (--no-symmetric), or train adapters that are not pooled"
        )
    if linear.apart() is not None:
        raise ParetoError(f"{name}: columns are kept apart, which its zero-points do not reach; leave pooling out")
    return found


def with_moved(name: str, linear: QuantizedLinear, up: Tensor, down: Tensor) -> QuantizedLinear:
    """Return a layer whose zero-points hold what a pooled adapter learnt.

    Args:
        name: the layer's, for errors.
        linear: the layer.
        up: float32 [out, rank], scaled.
        down: float32 [rank, groups].

    Raises:
        ParetoError: its zero-points cannot hold it, or the adapter is one of another shape.

    """
    grid = check_pools(name, linear)
    if (len(up), down.shape[1]) != tuple(grid.scale.shape):
        raise ParetoError(
            f"{name}: the pooled adapter is one for {len(up)} outputs and {down.shape[1]} groups, the layer has "
            f"{grid.scale.shape[0]} and {grid.scale.shape[1]}; it was trained over another model"
        )
    zero = moved(grid.zero_point, up @ down, grid.bits).to(torch.int8)
    return linear.having(GridCodes(grid.codes, grid.scale, zero, grid.bits))


def moved(zero_point: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Return zero-points that make weights larger by whole steps of their grids, where the grid has room for that.

    Args:
        zero_point: int8 [out, groups].
        steps: float32 [out, groups]; gradients pass the rounding.
        bits: of a code.

    Returns:
        float32 [out, groups], integers between the lowest and the highest code, or where the zero-point was.

    """
    zero, half = zero_point.float(), 1 << (bits - 1)
    low, high = zero.clamp(max=-half), zero.clamp(min=half - 1)
    return torch.maximum(torch.minimum(zero - straight(steps, torch.round), high), low)


class PooledLora(Linear):
    """A coded layer with pooled adapters; peft makes one of each layer that an adapter is for.

    ``lora_A`` has an input for each group, ``lora_B`` is as in LoRA; peft saves and loads both.

    Raises:
        ParetoError: the layer's weight has no zero-points that could move, or its inputs are rounded.

    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; see peft's."""
        base, name = self.get_base_layer(), str(kwargs.get("target_name", "") or "a layer")
        grid = check_pools(name, base.linear())
        if base.rounding is not None:
            raise ParetoError(f"{name}: serving rounds its inputs, which pooled adapters are not made for")
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        old = self.lora_A[adapter_name].weight
        down = nn.Linear(grid.scale.shape[1], r, bias=False, device=old.device, dtype=old.dtype)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        down.weight.requires_grad_(old.requires_grad)
        self.lora_A[adapter_name] = down

    def change(self, adapter: str) -> Tensor:
        """Return what the adapter adds to the weights of each group, float32 [out, groups]."""
        scale, zero, bits = _grid(self.get_base_layer())
        up, down = self.lora_B[adapter].weight.float(), self.lora_A[adapter].weight.float()
        # In the order of merge.py, so that both round the same numbers; under autocast the product would be in 16 bits.
        with torch.autocast(up.device.type, enabled=False):
            steps = (self.scaling[adapter] * up) @ down
        return (zero.float() - moved(zero, steps, bits)) * scale.float()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter adds to the weight, [out, in]."""
        change = self.change(adapter)
        return change.repeat_interleave(self.in_features // change.shape[1], 1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: codes are merged into on disk."""
        raise ParetoError("adapters over codes are merged on disk; see quant_methods/finetuning/merge.py")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for inputs [..., in], with the active adapters' unless they are disabled."""
        out = self.get_base_layer()(x)
        if self.disable_adapters:
            return out
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                change = self.change(adapter)
                pooled = self.lora_dropout[adapter](x).unflatten(-1, (change.shape[1], -1)).sum(-1)
                out = out + functional.linear(pooled, change.to(pooled.dtype)).to(out.dtype)
        return out


def _grid(layer: CodedLinear) -> tuple[Tensor, Tensor, int]:
    """Return scales, zero-points and bits without unpacking the codes, where they are packed."""
    if layer.form is not None:
        return layer.tensors["weight_scale"], layer.tensors["weight_zero_point"], layer.form.bulk.bits
    grid = layer.linear().part(GridCodes)
    return grid.scale, grid.zero_point, grid.bits
