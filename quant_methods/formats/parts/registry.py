"""The parts that a weight may have: to add one, write its file and enter its form here."""

from __future__ import annotations

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.bitmap_codes import BitmapForm
from quant_methods.formats.parts.columns import ColumnsForm
from quant_methods.formats.parts.grid_codes import GridForm
from quant_methods.formats.parts.low_rank import LowRankForm
from quant_methods.formats.parts.part import Part, PartForm
from quant_methods.formats.parts.semi_sparse import SemiSparseForm
from quant_methods.formats.parts.single_weights import SparseForm
from quant_methods.formats.parts.table_codes import TableForm
from quant_methods.formats.parts.trellis_codes import TrellisForm

FORMS: dict[str, type[PartForm]] = {
    form.part.kind: form
    for form in (
        GridForm,
        TableForm,
        TrellisForm,
        SemiSparseForm,
        BitmapForm,
        ColumnsForm,
        SparseForm,
        LowRankForm,
    )
}
"""Parts by their name in metadata, in the order in which they are stored and added up; bulks come first."""


def form_named(kind: object, where: str) -> type[PartForm]:
    """Return the form of a part by its name in metadata.

    Raises:
        ParetoError: ``where``; there is none of that name.

    """
    if not isinstance(kind, str) or kind not in FORMS:
        raise ParetoError(
            f"{where}: part {kind!r} is unknown to this vllm-pareto, which knows {', '.join(FORMS)}; install the "
            "vllm-pareto that wrote the checkpoint"
        )
    return FORMS[kind]


def place(part: type[Part]) -> int:
    """Return a part's place in the order of parts.

    Raises:
        ParetoError: it is not registered.

    """
    for index, form in enumerate(FORMS.values()):
        if form.part is part:
            return index
    raise ParetoError(f"{part.__name__} is no registered part of a weight; enter its form in formats/parts/registry.py")
