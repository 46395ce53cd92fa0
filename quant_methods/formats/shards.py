"""Cuts quantized layers as tensor parallelism does, and puts them on top of each other as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence

from quant_methods.formats.parts.part import Range
from quant_methods.formats.quantized import QuantizedLinear


def share(full: int, part: int, rank: int, ranks: int) -> Range:
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


def cut(linear: QuantizedLinear, rows: Range, inputs: Range) -> QuantizedLinear:
    """Return what a layer is for some of its output and input channels.

    Raises:
        ParetoError: a part cannot be cut there, as where input channels begin or end inside a group.

    """
    return QuantizedLinear(*(part.cut(rows, inputs) for part in linear.parts))


def stack(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Return one layer with the output channels of several, whose bulks stack (``Bulk.stacks_with``).

    Other parts need not be there in all. Input channels that some keep apart and others do not are kept apart in all.
    """
    if len(linears) == 1:
        return linears[0]
    kinds = dict.fromkeys(type(part) for linear in linears for part in linear.parts)
    return QuantizedLinear(*(kind.stack(linears) for kind in kinds))
