"""Random quantized layers of any form, and a weight step that makes parts that no method of the tests does."""

from dataclasses import dataclass

import torch

from quant_methods.formats.grid import expand, fit, round_to_grid
from quant_methods.formats.native_format import Form
from quant_methods.formats.quantized import Columns, LowRank, QuantizedLinear, Sparse
from quant_methods.recipe import LinearProblem, WeightStep


def random_layer(form: Form, rows: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
    """Return a layer whose weight is about 1/sqrt(inputs), so that outputs are about 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * (3 / inputs) ** 0.5

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    groups = 1 if form.group_size == -1 else inputs // form.group_size
    half = 1 << (form.bits - 1)
    if form.table:
        codes, table = integers(0, 2 * half, rows, inputs), uniform(rows, 2 * half).to(dtype)
        linear = QuantizedLinear(codes, table[:, :0], codes[:, :0], table)
    else:
        codes, scale = integers(-half, half, rows, inputs), (uniform(rows, groups) / half).to(dtype)
        zero = torch.zeros((rows, groups), dtype=torch.int8)
        if not form.symmetric:
            zero = integers(-half, half, rows, groups)
        linear = QuantizedLinear(codes, scale, zero)
    if form.columns:
        index = torch.randperm(inputs, generator=generator)[: form.columns].sort().values.int()
        if form.column_bits == 8:
            scale = (uniform(rows).abs() / 32).to(dtype)
            linear.columns = Columns(index, integers(-128, 128, rows, form.columns), scale)
        else:
            linear.columns = Columns(index, (uniform(rows, form.columns) * 4).to(dtype))
    if form.sparse:
        chosen = torch.rand((rows, inputs), generator=generator) < 0.03
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)]).int()
        linear.sparse = Sparse(starts, chosen.nonzero()[:, 1].int(), (uniform(int(chosen.sum())) * 3).to(dtype))
    if form.rank:
        linear.low_rank = LowRank(uniform(rows, form.rank).to(dtype), uniform(form.rank, inputs).to(dtype))
    return linear


@dataclass(frozen=True)
class Parts(WeightStep):
    """Round-to-nearest with whatever parts a form names, each made the plainest way that means something."""

    table: bool = False
    columns: int = 0
    column_bits: int = 16
    sparse: bool = False
    product: int = 0

    @property
    def plain(self) -> bool:
        return not (self.table or self.columns or self.sparse or self.product)


def quantize(step: Parts, problem: LinearProblem) -> QuantizedLinear:
    weight, dtype = problem.weight.clone(), problem.scale_dtype
    inputs = weight.shape[1]
    columns = sparse = low_rank = None
    if step.columns:
        index = weight.abs().amax(0).topk(step.columns).indices.sort().values
        kept = weight[:, index]
        weight[:, index] = 0
        if step.column_bits == 8:
            scale = (kept.abs().amax(1) / 127).to(dtype)
            columns = Columns(
                index.int(), (kept / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale
            )
        else:
            columns = Columns(index.int(), kept.to(dtype))
    if step.sparse:
        chosen = weight.abs() > weight.abs().flatten().kthvalue(int(0.99 * weight.numel())).values
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)]).int()
        sparse = Sparse(starts, chosen.nonzero()[:, 1].int(), weight[chosen].to(dtype))
        weight[chosen] = 0
    if step.table:
        levels = torch.linspace(0.02, 0.98, 1 << step.bits)
        table = weight.quantile(levels, dim=1).T.to(dtype)
        codes = (weight[:, :, None] - table.float()[:, None, :]).abs().argmin(-1).to(torch.int8)
        linear = QuantizedLinear(codes, table[:, :0], codes[:, :0], table, columns, sparse)
    else:
        # Clipping matters at 2 bits, where the largest weight leaves nothing for the others.
        scale, zero = fit(weight, step.grid, search="mse" if step.bits == 2 else "minmax", scale_dtype=dtype)
        codes = round_to_grid(weight, expand(scale, inputs), expand(zero, inputs), step.grid).to(torch.int8)
        linear = QuantizedLinear(codes, scale.to(dtype), zero.to(torch.int8), None, columns, sparse)
    if step.product:
        u, s, v = torch.linalg.svd(problem.weight - linear.read(), full_matrices=False)
        low_rank = ((u * s.sqrt())[:, : step.product].to(dtype), (s.sqrt()[:, None] * v)[: step.product].to(dtype))
        linear.low_rank = LowRank(*(part.contiguous() for part in low_rank))
    return linear
