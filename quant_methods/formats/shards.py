"""Cuts quantized layers as tensor parallelism does, and puts them on top of each other as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.quantized import Columns, LowRank, QuantizedLinear, Sparse


def share(full: int, part: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the range of channels that a rank holds of a layer.

    Args:
        full: the layer's channels.
        part: the channels of each rank: ``full / ranks``, or more if ranks share them (key and value heads of which
            there are fewer than ranks; layers that every rank holds whole).
        rank: this one.
        ranks: how many there are.

    """
    sharing = max(1, part * ranks // full)
    start = rank // sharing * part
    return start, start + part


def cut(linear: QuantizedLinear, rows: tuple[int, int], inputs: tuple[int, int]) -> QuantizedLinear:
    """Return what a layer is for some of its output and input channels.

    Args:
        linear: the layer.
        rows: first output channel, and the one after the last.
        inputs: the same for input channels.

    Raises:
        ParetoError: the input channels begin or end inside a group.

    """
    top, bottom = rows
    left, right = inputs
    groups, width = linear.scale.shape[1], linear.codes.shape[1]
    group_range = slice(0, groups)
    if groups > 1:
        size = width // groups
        if left % size or right % size:
            raise ParetoError(
                f"tensor parallelism would cut a layer of {width} input channels inside its groups of {size}; use "
                "fewer ranks, or a checkpoint with smaller groups"
            )
        group_range = slice(left // size, right // size)
    part = QuantizedLinear(
        linear.codes[top:bottom, left:right],
        linear.scale[top:bottom, group_range],
        linear.zero_point[top:bottom, group_range],
        None if linear.table is None else linear.table[top:bottom],
    )
    if linear.columns is not None:
        index = linear.columns.index
        inside = (index >= left) & (index < right)
        scale = linear.columns.scale
        part.columns = Columns(
            index[inside] - left,
            linear.columns.weight[top:bottom][:, inside],
            None if scale is None else scale[top:bottom],
        )
    if linear.sparse is not None:
        counts = linear.sparse.rows()
        inside = (counts >= top) & (counts < bottom) & (linear.sparse.columns >= left) & (linear.sparse.columns < right)
        part.sparse = Sparse(
            _starts(counts[inside] - top, bottom - top),
            linear.sparse.columns[inside] - left,
            linear.sparse.values[inside],
        )
    if linear.low_rank is not None:
        part.low_rank = LowRank(linear.low_rank.up[top:bottom], linear.low_rank.down[:, left:right])
    return part


def stack(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Return one layer with the output channels of several, whose bulks have the same bits, groups and kind.

    Input channels that some keep apart and others do not are kept apart in all.
    """
    if len(linears) == 1:
        return linears[0]
    whole = QuantizedLinear(
        torch.cat([linear.codes for linear in linears]),
        torch.cat([linear.scale for linear in linears]),
        torch.cat([linear.zero_point for linear in linears]),
    )
    tables = [linear.table for linear in linears if linear.table is not None]
    if tables:
        whole.table = torch.cat(tables)
    if any(linear.columns is not None for linear in linears):
        whole.columns = _stack_columns(linears)
    if any(linear.sparse is not None for linear in linears):
        whole.sparse = _stack_sparse(linears)
    ranks = [linear.low_rank for linear in linears]
    if any(rank is not None for rank in ranks):
        ups = [
            linear.low_rank.up if linear.low_rank is not None else linear.scale.new_zeros((len(linear.codes), 0))
            for linear in linears
        ]
        downs = [rank.down for rank in ranks if rank is not None]
        whole.low_rank = LowRank(torch.block_diag(*ups).to(downs[0].dtype), torch.cat(downs))
    return whole


def _starts(rows: Tensor, count: int) -> Tensor:
    """Return where each of ``count`` rows begins, int32 [count + 1], from the rows of the values."""
    counts = torch.bincount(rows, minlength=count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def _stack_sparse(linears: Sequence[QuantizedLinear]) -> Sparse:
    rows, first = [], 0
    for linear in linears:
        if linear.sparse is not None:
            rows.append(linear.sparse.rows() + first)
        first += len(linear.codes)
    parts = [linear.sparse for linear in linears if linear.sparse is not None]
    return Sparse(
        _starts(torch.cat(rows), first),
        torch.cat([part.columns for part in parts]),
        torch.cat([part.values for part in parts]),
    )


def _stack_columns(linears: Sequence[QuantizedLinear]) -> Columns:
    parts = [linear.columns for linear in linears if linear.columns is not None]
    alike = len(parts) == len(linears) and all(
        torch.equal(part.index, parts[0].index) and (part.scale is None) == (parts[0].scale is None) for part in parts
    )
    if alike:
        scales = [part.scale for part in parts if part.scale is not None]
        return Columns(
            parts[0].index, torch.cat([part.weight for part in parts]), torch.cat(scales) if scales else None
        )
    index = torch.cat([part.index for part in parts]).unique()
    first = parts[0]
    dtype = first.weight.dtype if first.scale is None else first.scale.dtype
    weights = []
    for linear in linears:
        weight = linear.bulk()
        if linear.columns is not None:
            weight[:, linear.columns.index.long()] = linear.columns.read()
        weights.append(weight[:, index.long()].to(dtype))
    return Columns(index, torch.cat(weights))
