"""How version 1 of the format of ours said which parts a layer has: one flat record, of the parts that there were then.

Checkpoints with it are still read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from kv_cache.errors import ParetoError
from quant_methods.formats.form import Form
from quant_methods.formats.parts.columns import ColumnsForm
from quant_methods.formats.parts.grid_codes import GridForm
from quant_methods.formats.parts.low_rank import LowRankForm
from quant_methods.formats.parts.part import PartForm
from quant_methods.formats.parts.single_weights import SparseForm
from quant_methods.formats.parts.table_codes import TableForm


def flat_form(
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    table: bool = False,
    columns: int = 0,
    column_bits: int = 16,
    sparse: bool = False,
    rank: int = 0,
    activations: str = "none",
) -> Form:
    """Return the form that a flat record means.

    Args:
        bits: of a code of the bulk.
        group_size: input channels that share a scale; -1 for one scale per output channel. A table has none.
        symmetric: without zero-points.
        table: codes are indices into a table of each output channel.
        columns: input channels kept apart; 0 for none.
        column_bits: bits of a weight there.
        sparse: single weights are added.
        rank: of the product that is added; 0 for none.
        activations: what serving rounds each token's inputs to.

    """
    parts: list[PartForm] = [TableForm(bits) if table else GridForm(bits, group_size, symmetric)]
    parts += [ColumnsForm(columns, column_bits)] if columns else []
    parts += [SparseForm()] if sparse else []
    parts += [LowRankForm(rank)] if rank else []
    return Form(tuple(parts), activations)


def parse_flat(values: Mapping[str, Any], where: str) -> Form:
    """Read a flat record of config.json.

    Raises:
        ParetoError: ``where``, and an unknown key, a missing one, or a bad value.

    """
    known = inspect.signature(flat_form).parameters
    if unknown := sorted(set(values) - set(known)):
        raise ParetoError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if "bits" not in values:
        raise ParetoError(f"{where}: bits is missing")
    for name in ("table", "sparse"):
        if not isinstance(values.get(name, False), bool):
            raise ParetoError(f"{where}: {name} is {values[name]!r}, expected bool")
    if values.get("table") and values.get("group_size", -1) != -1:
        raise ParetoError(f"{where}: group_size is {values['group_size']}, expected -1 with a table")
    form = flat_form(**values)
    form.check(where)
    return form
