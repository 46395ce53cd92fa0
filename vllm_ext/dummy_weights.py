"""Random layers in the format of ours for ``--load-format dummy``, where vLLM measures a shape without weights."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_methods.formats.native_format import Form
from quant_methods.formats.quantized import Columns, LowRank, QuantizedLinear, Sparse

SIZE = 1e-3
"""Of a weight: vLLM's dummy weights are drawn evenly from -1e-3 to 1e-3."""
SPARSE_SHARE = 0.005
"""Of weights that are stored singly (Kim et al., SqueezeLLM, 2023, section 4.2, keep 0.45%)."""


def random_linear(form: Form, rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> QuantizedLinear:
    """Return a layer [rows, inputs] of a form, on the device.

    Args:
        form: how it is stored.
        rows: output channels.
        inputs: input channels.
        dtype: of scales and of what is stored in 16 bits.
        device: where.

    """

    def uniform(*shape: int) -> Tensor:
        return ((torch.rand(shape, device=device) * 2 - 1) * SIZE).to(dtype)

    half = 1 << (form.bits - 1)
    low = 0 if form.table else -half
    codes = torch.randint(low, low + 2 * half, (rows, inputs), device=device, dtype=torch.int8)
    groups = 0 if form.table else 1 if form.group_size == -1 else inputs // form.group_size
    zero = torch.zeros(rows, groups, dtype=torch.int8, device=device)
    if not form.symmetric:
        zero += torch.randint(-1, 2, zero.shape, device=device, dtype=torch.int8)
    linear = QuantizedLinear(codes, uniform(rows, groups) / half, zero, uniform(rows, 2 * half) if form.table else None)
    if form.columns:
        index = _spread(form.columns, inputs, device)
        if form.column_bits == 8:
            kept = torch.randint(-128, 128, (rows, form.columns), device=device, dtype=torch.int8)
            linear.columns = Columns(index, kept, uniform(rows) / 128)
        else:
            linear.columns = Columns(index, uniform(rows, form.columns))
    if form.sparse:
        each = max(round(inputs * SPARSE_SHARE), 1)
        starts = torch.arange(rows + 1, device=device, dtype=torch.int32) * each
        channels = _spread(each, inputs, device).repeat(rows)
        linear.sparse = Sparse(starts, channels, uniform(rows * each))
    if form.rank:
        linear.low_rank = LowRank(uniform(rows, form.rank), uniform(form.rank, inputs))
    return linear


def _spread(count: int, inputs: int, device: torch.device) -> Tensor:
    """Return int32 [count], channels evenly spread."""
    # In integers: PyTorch's default dtype is the model's here, which does not have all of them.
    return (torch.arange(count, device=device) * inputs // count).int()
