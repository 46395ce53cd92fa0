"""A quantized layer at serving time: its bulk (``bulk.py``) and what is added beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_methods.formats.grid import round_tokens
from quant_methods.formats.native_format import ACTIVATION_BITS, Form
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.formats.shards import stack
from quant_methods.kernels.beside import Beside
from quant_methods.kernels.low_bit_cuda import LowBitCUDA
from vllm_ext.bulk import LowBitBulk, make_bulk


class ServedLinear(nn.Module):
    """Multiplies by one layer, or by several on top of each other whose bulks are stored alike.

    Args:
        linear: the layer, on the device that it will run on.
        form: how its bulk is stored.
        dtype: 16-bit dtype of inputs and outputs.

    """

    def __init__(self, linear: QuantizedLinear, form: Form, dtype: torch.dtype) -> None:
        super().__init__()
        codes, columns, index, mask = linear.codes, None, None, None
        if linear.columns is not None:
            index, columns = linear.columns.index.long(), linear.columns.read()
            if form.activations != "none":
                # The bulk does not see these channels, whose large values would coarsen the rounding of the others.
                mask = torch.ones(codes.shape[1], dtype=dtype, device=codes.device).index_fill_(0, index, 0)
            elif linear.table is not None:
                # A table need not hold a zero: the correction takes off again what the codes there mean.
                columns = columns - linear.table.float().gather(1, codes[:, index].long())
            else:
                codes = codes.index_copy(
                    1, index, linear.zero_point[:, index * linear.scale.shape[1] // codes.shape[1]]
                )
        bulk = QuantizedLinear(codes, linear.scale, linear.zero_point, linear.table)
        self.bulk = make_bulk(bulk, form, dtype)
        self.activation_bits = None if self.bulk.rounds else ACTIVATION_BITS[form.activations]
        self.register_buffer("mask", mask, persistent=False)
        self.beside, self.ours = None, None
        if linear.beside:
            self.beside = Beside(index, columns, linear.low_rank, linear.sparse, dtype)
            # Ours multiplies by both at once, if the inputs are the same: mask and rounding are for the bulk alone.
            same = mask is None and self.activation_bits is None
            if same and isinstance(self.bulk, LowBitBulk) and isinstance(self.bulk.linear, LowBitCUDA):
                self.ours = self.bulk.linear
            self.beside.prepare(codes.shape[1], None if self.ours is None else self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., out] with inputs [..., in]."""
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        rounded = x if self.mask is None else x * self.mask
        if self.activation_bits is not None:
            rounded = round_tokens(rounded.float(), self.activation_bits).to(x.dtype)
        if self.ours is not None:
            y = self.ours.apply(x, self.beside)
        else:
            y = self.bulk.apply(rounded)
            if self.beside is not None:
                y = self.beside(y, x)
        return y.reshape(*shape, y.shape[-1])


def serve(linears: Sequence[QuantizedLinear], forms: Sequence[Form], dtype: torch.dtype) -> list[ServedLinear]:
    """Return what multiplies by layers that vLLM merges, neighbours that are stored alike in one."""
    served: list[ServedLinear] = []
    first = 0
    for last in range(1, len(linears) + 1):
        if last == len(linears) or not _alike((linears[first], forms[first]), (linears[last], forms[last])):
            served.append(ServedLinear(stack(linears[first:last]), forms[first], dtype))
            first = last
    return served


def _alike(one: tuple[QuantizedLinear, Form], other: tuple[QuantizedLinear, Form]) -> bool:
    """Return whether two layers' bulks can be one."""
    kinds = [(form.bits, form.table, form.activations, linear.scale.shape[1:]) for linear, form in (one, other)]
    if kinds[0] != kinds[1]:
        return False
    if one[1].activations == "none":
        return True
    # What is left out of the rounding must be the same.
    kept = [None if linear.columns is None else linear.columns.index.tolist() for linear, _ in (one, other)]
    return kept[0] == kept[1]
