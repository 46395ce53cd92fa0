"""Which kernels multiply by a part of a weight on a device: an entry for each; what has none is refused.

A bulk's entry makes what multiplies by it (``bulk.py``), an addition's what adds it to the bulk's product. Additions
with the same entry are added together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.bitmap_codes import BitmapCodes
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.parts.part import Addition, Bulk, Part
from quant_methods.formats.parts.semi_sparse import SemiSparseCodes
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.parts.trellis_codes import TrellisCodes
from quant_methods.kernels.beside import Beside
from vllm_ext.bulk import (
    BulkKernel,
    bitmap_on_cpu,
    bitmap_on_cuda,
    grid_on_cpu,
    grid_on_cuda,
    semi_sparse_on_cpu,
    semi_sparse_on_cuda,
    table_on_cpu,
    table_on_cuda,
    trellis_on_cpu,
    trellis_on_cuda,
)


class AdditionKernel(Protocol):
    """Adds parts to a product with the bulk; a module of PyTorch's."""

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the layer's product [tokens, out] from the bulk's and the inputs [tokens, in]."""
        ...

    def prepare(self, width: int, product: Callable[[Tensor], Tensor] | None = None) -> None:
        """Compile and load what decoding needs; see :meth:`quant_methods.kernels.beside.Beside.prepare`."""
        ...


BulkKernels = Callable[[Any, str, torch.dtype], BulkKernel]
"""Makes what multiplies by a bulk, from it, what inputs are rounded to, and the dtype of inputs and outputs."""
AdditionKernels = Callable[[Sequence[Addition], torch.dtype], AdditionKernel]
"""Makes what adds parts, from them and the dtype of inputs and outputs."""

KERNELS: dict[type[Part], dict[str, BulkKernels | AdditionKernels]] = {
    GridCodes: {"cpu": grid_on_cpu, "cuda": grid_on_cuda},
    TableCodes: {"cpu": table_on_cpu, "cuda": table_on_cuda},
    TrellisCodes: {"cpu": trellis_on_cpu, "cuda": trellis_on_cuda},
    SemiSparseCodes: {"cpu": semi_sparse_on_cpu, "cuda": semi_sparse_on_cuda},
    BitmapCodes: {"cpu": bitmap_on_cpu, "cuda": bitmap_on_cuda},
    Columns: {"cpu": Beside, "cuda": Beside},
    Sparse: {"cpu": Beside, "cuda": Beside},
    LowRank: {"cpu": Beside, "cuda": Beside},
}
"""By part and type of device."""


@overload
def kernels_for(part: Bulk, device: torch.device) -> BulkKernels: ...
@overload
def kernels_for(part: Addition, device: torch.device) -> AdditionKernels: ...
def kernels_for(part: Part, device: torch.device) -> Any:
    """Return what makes the kernels of a part on a device.

    Raises:
        ParetoError: none are known for the part, or none for it on such a device.

    """
    check_served(type(part), device)
    return KERNELS[type(part)][device.type]


def check_served(kind: type[Part], device: torch.device) -> None:
    """Refuse a kind of part that has no kernels on a device.

    Raises:
        ParetoError: none are known for the part, or none for it on such a device.

    """
    if kind not in KERNELS:
        raise ParetoError(
            f"nothing multiplies by a weight's {kind.kind!r} part ({kind.what}); parts that are served: "
            f"{', '.join(known.kind for known in KERNELS)}"
        )
    if device.type not in KERNELS[kind]:
        raise ParetoError(
            f"a weight's {kind.kind!r} part ({kind.what}) has no kernel on {device.type}; it has on "
            f"{', '.join(sorted(KERNELS[kind]))}"
        )
