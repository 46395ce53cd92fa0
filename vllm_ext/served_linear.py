"""A quantized layer at serving time: what multiplies by its bulk, and what adds its other parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_methods.formats.form import ACTIVATION_BITS
from quant_methods.formats.grid import round_tokens
from quant_methods.formats.parts.part import Addition
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.formats.shards import stack
from quant_methods.kernels.beside import Beside
from quant_methods.kernels.low_bit_cuda import LowBitCUDA
from vllm_ext.bulk import LowBitBulk
from vllm_ext.part_kernels import AdditionKernels, kernels_for


def device_of(linear: QuantizedLinear) -> torch.device:
    """Return where a layer lies, and so will be multiplied."""
    return linear.bulk.device


class ServedLinear(nn.Module):
    """Multiplies by one layer, or by several on top of each other whose bulks are stored alike.

    Args:
        linear: the layer, on the device that it will run on.
        activations: what serving rounds each token's inputs to, as in ``Form``.
        dtype: 16-bit dtype of inputs and outputs.

    Raises:
        ParetoError: a part has no kernel on the device.

    """

    def __init__(self, linear: QuantizedLinear, activations: str, dtype: torch.dtype) -> None:
        super().__init__()
        bulk, additions, apart, mask = linear.bulk, list(linear.additions), linear.apart(), None
        (_, width), device = linear.shape, device_of(linear)
        if activations == "none":
            for place, part in enumerate(additions):
                bulk, additions[place] = part.take_over(bulk)
        elif apart is not None:
            # The bulk does not see these channels, whose large values would coarsen the rounding of the others.
            mask = torch.ones(width, dtype=dtype, device=apart.device).index_fill_(0, apart, 0)
        self.bulk = kernels_for(bulk, device)(bulk, activations, dtype)
        self.activation_bits = None if self.bulk.rounds else ACTIVATION_BITS[activations]
        self.register_buffer("mask", mask, persistent=False)
        together: dict[AdditionKernels, list[Addition]] = {}
        for part in additions:
            together.setdefault(kernels_for(part, device), []).append(part)
        self.additions = nn.ModuleList(make(parts, dtype) for make, parts in together.items())
        self.ours: LowBitCUDA | None = None
        # Ours multiplies by all at once, if the inputs are the same: mask and rounding are for the bulk alone.
        same = mask is None and self.activation_bits is None and len(self.additions) == 1
        if same and isinstance(self.bulk, LowBitBulk) and isinstance(self.additions[0], Beside):
            self.ours = self.bulk.linear if isinstance(self.bulk.linear, LowBitCUDA) else None
        for addition in self.additions:
            addition.prepare(width, None if self.ours is None else self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., out] with inputs [..., in]."""
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        rounded = x if self.mask is None else x * self.mask
        if self.activation_bits is not None:
            rounded = round_tokens(rounded.float(), self.activation_bits).to(x.dtype)
        if self.ours is not None:
            y = self.ours.apply(x, self.additions[0])
        else:
            y = self.bulk.apply(rounded)
            for addition in self.additions:
                y = addition(y, x)
        return y.reshape(*shape, y.shape[-1])


def serve(linears: Sequence[QuantizedLinear], activations: Sequence[str], dtype: torch.dtype) -> list[ServedLinear]:
    """Return what multiplies by layers that vLLM merges, neighbours that are stored alike in one.

    Args:
        linears: the layers.
        activations: what the inputs of each are rounded to.
        dtype: 16-bit dtype of inputs and outputs.

    """
    served: list[ServedLinear] = []
    first = 0
    for last in range(1, len(linears) + 1):
        if last == len(linears) or not _alike((linears[first], activations[first]), (linears[last], activations[last])):
            served.append(ServedLinear(stack(linears[first:last]), activations[first], dtype))
            first = last
    return served


def _alike(one: tuple[QuantizedLinear, str], other: tuple[QuantizedLinear, str]) -> bool:
    """Return whether two layers' bulks can be one, with their inputs rounded alike."""
    if one[1] != other[1] or not one[0].bulk.stacks_with(other[0].bulk):
        return False
    if one[1] == "none":
        return True
    # What is left out of the rounding must be the same.
    kept = [None if (apart := linear.apart()) is None else apart.tolist() for linear, _ in (one, other)]
    return kept[0] == kept[1]
