"""Which of some candidates for a group's scale and zero-point reads its weights back best: compiled, for CPUs.

The same search by PyTorch's operations (quant_methods/formats/grid.py, the specification) goes through memory six times
for each candidate, and took most of the time of round-to-nearest; in ``csrc/`` a group stays in the first cache.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kv_cache.compiled import compiled_library
from kv_cache.doors import expect

MAX_CANDIDATES = 128
"""``PARETO_MAX_CANDIDATES`` of ``csrc/grid_search.h``."""

MAX_PAIRS = 128
"""``PARETO_MAX_PAIRS`` there: the widest group whose errors may count together; a multiple of 8."""

_ptr, _i64, _f32, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


class _Search(ctypes.Structure):
    _fields_ = (
        ("weight", _ptr),
        ("importance", _ptr),
        ("scale", _ptr),
        ("zero", _ptr),
        ("best", _ptr),
        ("rows", _i64),
        ("groups", _i64),
        ("width", _i64),
        ("candidates", _i64),
        ("low", _f32),
        ("high", _f32),
        ("num_threads", _i32),
        ("pairs", _i32),
    )


def _library() -> ctypes.CDLL | None:
    return compiled_library("quant_methods._cpu", search=_Search)


def serves(grouped: Tensor, importance: Tensor) -> bool:
    """Return whether `best_candidates` takes weights [rows, groups, width] of that importance."""
    known = importance.dim() == 2 or _pairs_fit(importance)
    return grouped.is_cpu and grouped.dtype == torch.float32 and known and _library() is not None


def _pairs_fit(importance: Tensor) -> bool:
    width = importance.shape[-1]
    return importance.dim() == 3 and width <= MAX_PAIRS and width % 8 == 0


def best_candidates(
    grouped: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, low: int, high: int, isa: str = "best"
) -> tuple[Tensor, Tensor]:
    """Return for each group the candidate of the least ``sum importance * e^2``, the first of equal.

    ``e`` is what is read back, less the weight. With an importance of pairs the least ``e^T importance e`` is meant.

    Args:
        grouped: float32 [rows, groups, width], weights.
        importance: float32 [groups, width]; of pairs [groups, width, width], symmetric.
        scales: float32 [candidates, rows, groups]. Neighbours of equal scale share the division.
        zeros: float32 of the same shape, integral.
        low: smallest code.
        high: largest code.
        isa: "generic", "avx2" or "avx512", which this processor must have; "best" takes the widest that it has.

    Returns:
        The scale and the zero-point of each group, float32 [rows, groups].

    Raises:
        ParetoError: shapes, dtypes or devices do not fit: the library sees addresses alone.

    """
    library = _library()
    assert library is not None
    rows, groups, width = grouped.shape
    importance = importance.float()
    numbers = (grouped, importance, scales, zeros)
    expect(
        "the search for ranges",
        (
            (all(x.dtype == torch.float32 for x in numbers), "float32 weights, scales and zero-points"),
            (
                tuple(importance.shape) == (groups, width)
                or (tuple(importance.shape) == (groups, width, width) and _pairs_fit(importance)),
                f"an importance [{groups}, {width}], or of pairs in groups of a multiple of 8 up to {MAX_PAIRS}",
            ),
            (scales.shape == zeros.shape and tuple(scales.shape[1:]) == (rows, groups), "candidates for each group"),
            (0 < len(scales) <= MAX_CANDIDATES, f"1 to {MAX_CANDIDATES} candidates, not {len(scales)}"),
            (all(x.is_cpu for x in numbers), "tensors on the CPU"),
        ),
    )
    grouped, importance, scales, zeros = (x.contiguous() for x in numbers)
    best = torch.empty(rows, groups, dtype=torch.int32)
    tensors = (grouped, importance, scales, zeros, best)
    threads = torch.get_num_threads()
    sizes = (rows, groups, width, len(scales))
    search = _Search(*(x.data_ptr() for x in tensors), *sizes, low, high, threads, importance.dim() == 3)
    status = getattr(library, f"pareto_grid_search_{isa}")(ctypes.byref(search))
    assert status == 0, status
    place = best.long()[None]
    return scales.gather(0, place)[0], zeros.gather(0, place)[0]
