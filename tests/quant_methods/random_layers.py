"""Random quantized layers of any form, and a weight step that makes parts that no method of the tests does."""

from dataclasses import dataclass

import torch

from quant_methods.formats.form import Form
from quant_methods.formats.grid import expand, fit, round_to_grid
from quant_methods.formats.parts.bitmap_codes import BitmapCodes, BitmapForm
from quant_methods.formats.parts.columns import Columns, ColumnsForm
from quant_methods.formats.parts.grid_codes import GridCodes, GridForm
from quant_methods.formats.parts.low_rank import LowRank, LowRankForm
from quant_methods.formats.parts.part import Part
from quant_methods.formats.parts.semi_sparse import NIBBLES, SemiSparseCodes, SemiSparseForm
from quant_methods.formats.parts.single_weights import Sparse, SparseForm
from quant_methods.formats.parts.table_codes import TableCodes, TableForm
from quant_methods.formats.parts.trellis_codes import TrellisCodes, TrellisForm
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.handlers import LinearProblem
from quant_methods.steps import RoundStep


def random_layer(form: Form, rows: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
    """Return a layer whose weight is about 1/sqrt(inputs), so that outputs are about 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * (3 / inputs) ** 0.5

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    half, parts = 1 << (form.bulk.bits - 1), []
    for part in form.parts:
        if isinstance(part, GridForm | BitmapForm):
            groups = GridForm(part.bits, part.group_size).groups(inputs)
            codes, scale = integers(-half, half, rows, inputs), (uniform(rows, groups) / half).to(dtype)
            zero = torch.zeros((rows, groups), dtype=torch.int8)
            if not part.symmetric:
                zero = integers(-half, half, rows, groups)
            if isinstance(part, BitmapForm):
                zeros = torch.rand((rows, inputs), generator=generator) < 0.6
                codes = torch.where(zeros, zero.repeat_interleave(inputs // groups, 1), codes)
            grid = GridCodes(codes, scale, zero, part.bits, part.symmetric)
            parts.append(BitmapCodes.of(grid) if isinstance(part, BitmapForm) else grid)
        elif isinstance(part, TableForm):
            parts.append(TableCodes(integers(0, 2 * half, rows, inputs), uniform(rows, 2 * half).to(dtype)))
        elif isinstance(part, TrellisForm):
            words = part.tensors(rows, inputs)["weight_trellis"].shape
            streams = integers(-(1 << 31), 1 << 31, *words, dtype=torch.int32)
            parts.append(TrellisCodes(streams, uniform(rows, part.groups(inputs)).to(dtype)))
        elif isinstance(part, SemiSparseForm):
            groups = part.groups(inputs)
            codes, scale = integers(-half, half, rows, inputs // 2), (uniform(rows, groups) / half).to(dtype)
            places = torch.tensor(NIBBLES, dtype=torch.uint8)[integers(0, len(NIBBLES), rows, inputs // 4).int()]
            zero = torch.zeros((rows, groups), dtype=torch.int8)
            if not part.symmetric:
                zero = integers(-half, half, rows, groups)
            parts.append(SemiSparseCodes(codes, places, scale, zero, part.bits, part.symmetric))
        elif isinstance(part, ColumnsForm):
            index = torch.randperm(inputs, generator=generator)[: part.count].sort().values.int()
            if part.bits == 8:
                scale = (uniform(rows).abs() / 32).to(dtype)
                parts.append(Columns(index, integers(-128, 128, rows, part.count), scale))
            else:
                parts.append(Columns(index, (uniform(rows, part.count) * 4).to(dtype)))
        elif isinstance(part, SparseForm):
            chosen = torch.rand((rows, inputs), generator=generator) < 0.03
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)]).int()
            values = (uniform(int(chosen.sum())) * 3).to(dtype)
            parts.append(Sparse(starts, chosen.nonzero()[:, 1].int(), values))
        elif isinstance(part, LowRankForm):
            parts.append(LowRank(uniform(rows, part.rank).to(dtype), uniform(part.rank, inputs).to(dtype)))
        else:
            raise AssertionError(part)
    return QuantizedLinear(*parts)


@dataclass(frozen=True)
class Parts(RoundStep):
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
    beside: list[Part] = []
    if step.columns:
        index = weight.abs().amax(0).topk(step.columns).indices.sort().values
        kept = weight[:, index]
        weight[:, index] = 0
        if step.column_bits == 8:
            scale = (kept.abs().amax(1) / 127).to(dtype)
            rounded = (kept / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
            beside.append(Columns(index.int(), rounded, scale))
        else:
            beside.append(Columns(index.int(), kept.to(dtype)))
    if step.sparse:
        chosen = weight.abs() > weight.abs().flatten().kthvalue(int(0.99 * weight.numel())).values
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)]).int()
        beside.append(Sparse(starts, chosen.nonzero()[:, 1].int(), weight[chosen].to(dtype)))
        weight[chosen] = 0
    if step.table:
        levels = torch.linspace(0.02, 0.98, 1 << step.bits)
        table = weight.quantile(levels, dim=1).T.to(dtype)
        codes = (weight[:, :, None] - table.float()[:, None, :]).abs().argmin(-1).to(torch.int8)
        linear = QuantizedLinear(TableCodes(codes, table), *beside)
    else:
        # Clipping matters at 2 bits, where the largest weight leaves nothing for the others.
        scale, zero = fit(weight, step.grid, search="mse" if step.bits == 2 else "minmax", scale_dtype=dtype)
        codes = round_to_grid(weight, expand(scale, inputs), expand(zero, inputs), step.grid).to(torch.int8)
        grid = GridCodes(codes, scale.to(dtype), zero.to(torch.int8), step.bits, step.symmetric)
        linear = QuantizedLinear(grid, *beside)
    if step.product:
        u, s, v = torch.linalg.svd(problem.weight - linear.read(), full_matrices=False)
        low_rank = ((u * s.sqrt())[:, : step.product].to(dtype), (s.sqrt()[:, None] * v)[: step.product].to(dtype))
        return linear.having(LowRank(*(part.contiguous() for part in low_rank)))
    return linear
