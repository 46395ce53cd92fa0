"""The streams of a trellis code that read back closest to given weights: a Viterbi search over the tiles.

Tseng et al., "QTIP" (2024), https://arxiv.org/abs/2406.11235, algorithm 4: a stream closes on itself, and so its last
pair leaves what its first one begins with. A first search, over the pairs from the middle on and around, says what they
share at the seam, and a second one begins and ends with that. ``search_in_torch`` is the specification;
``csrc/trellis_search_impl.h`` does it on CPUs, and ``kernels/csrc/trellis_search.cu`` on CUDA devices.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kv_cache.compiled import compiled_library
from kv_cache.doors import expect
from quant_methods.formats.parts.trellis import STATES, TILE_PAIRS, pair_values

_AT_ONCE = 1 << 24
"""Costs of states that PyTorch holds at once."""

_ptr, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Search(ctypes.Structure):
    _fields_ = (
        ("targets", _ptr),
        ("weights", _ptr),
        ("values", _ptr),
        ("turned", _ptr),
        ("states", _ptr),
        ("tiles", _i64),
        ("bits", _i32),
        ("num_threads", _i32),
    )


def search(targets: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Return streams whose pairs come close to targets.

    Args:
        targets: float32 [tiles, 128, 2], in units of :func:`quant_methods.formats.parts.trellis.pair_values`.
        bits: a weight, 2 to 4.
        weights: float32 of the same shape, not negative, of the squared errors; None: all are 1.

    Returns:
        int64 [tiles, 128], states that agree where they overlap.

    Raises:
        ParetoError: shapes, dtypes or devices do not fit.

    """
    _check(targets, bits, weights)
    if targets.is_cuda:
        # Triton and CUDA's compiler come with PyTorch for CUDA alone.
        from quant_methods.kernels.trellis_search_cuda import search_on_cuda

        return search_on_cuda(targets, bits, weights)
    if targets.is_cpu and _library() is not None:
        return search_on_cpu(targets, bits, weights)
    return search_in_torch(targets, bits, weights)


def _check(targets: Tensor, bits: int, weights: Tensor | None) -> None:
    given = [targets] if weights is None else [targets, weights]
    expect(
        "the search of a trellis",
        (
            (bits in (2, 3, 4), f"2, 3 or 4 bits, not {bits}"),
            (all(x.dtype == torch.float32 for x in given), "float32 targets and weights"),
            (targets.dim() == 3 and tuple(targets.shape[1:]) == (TILE_PAIRS, 2), f"targets [tiles, {TILE_PAIRS}, 2]"),
            (all(x.shape == targets.shape for x in given), "weights of the targets' shape"),
            (all(x.device == targets.device for x in given), f"tensors on {targets.device}"),
        ),
    )


def _library() -> ctypes.CDLL | None:
    return compiled_library("quant_methods._cpu", trellis=_Search)


@functools.cache
def _tables(bits: int) -> tuple[Tensor, Tensor]:
    """Return what states mean, in pairs of bfloat16 numbers: int32 [65536], and by their lower bits first."""
    values = pair_values().bfloat16().view(torch.int32).flatten()
    return values, values.view(1 << 2 * bits, -1).T.contiguous()


def search_on_cpu(targets: Tensor, bits: int, weights: Tensor | None = None, isa: str = "best") -> Tensor:
    """Search by the compiled library; see :func:`search`.

    Args:
        targets: on the CPU, like all here.
        bits: a weight.
        weights: of the squared errors.
        isa: "generic", "avx2" or "avx512", which this processor must have; "best" takes the widest that it has.

    """
    _check(targets, bits, weights)
    library = _library()
    assert library is not None
    # Held here, since the library sees addresses alone.
    targets, (values, turned) = targets.contiguous(), _tables(bits)
    given = None if weights is None else weights.contiguous()
    states = torch.empty(targets.shape[:2], dtype=torch.int32)
    place = None if given is None else given.data_ptr()
    parameters = _Search(
        targets.data_ptr(), place, values.data_ptr(), turned.data_ptr(), states.data_ptr(), len(targets), bits,
        torch.get_num_threads(),
    )  # fmt: skip
    status = getattr(library, f"pareto_trellis_search_{isa}")(ctypes.byref(parameters))
    assert status == 0, status
    return states.long()


def search_in_torch(targets: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Search by PyTorch's operations, in the targets' dtype; see :func:`search`."""
    parts = zip(targets.split(_AT_ONCE // STATES), _split(weights, len(targets)), strict=True)
    found = [_closing(part, bits, given) for part, given in parts]
    return torch.cat(found) if found else targets.new_empty((0, TILE_PAIRS), dtype=torch.int64)


def _split(weights: Tensor | None, count: int) -> list[Tensor] | list[None]:
    at_once = _AT_ONCE // STATES
    return [None] * -(-count // at_once) if weights is None else list(weights.split(at_once))


def _closing(targets: Tensor, bits: int, weights: Tensor | None) -> Tensor:
    half, overlaps = TILE_PAIRS // 2, STATES >> 2 * bits
    turned = None if weights is None else weights.roll(-half, 1)
    path = _viterbi(targets.roll(-half, 1), bits, turned, None)
    return _viterbi(targets, bits, weights, path[:, half] % overlaps)


def _viterbi(targets: Tensor, bits: int, weights: Tensor | None, seam: Tensor | None) -> Tensor:
    """Return the best path's states [tiles, 128]; with a seam [tiles] the best that begins and ends with it."""
    tiles, branches, overlaps = len(targets), 1 << 2 * bits, STATES >> 2 * bits
    values = pair_values(targets.device).to(targets.dtype)
    least = targets.new_zeros((tiles, overlaps))
    if seam is not None:
        least = torch.full_like(least, torch.inf).scatter_(1, seam[:, None], 0)
    chosen = []
    for pair in range(TILE_PAIRS):
        errors = (values - targets[:, pair, None]).square()
        cost = (errors if weights is None else errors * weights[:, pair, None]).sum(2)
        # A state begins with the overlap that its lower bits are, and leaves its upper ones.
        cost = cost.view(tiles, branches, overlaps) + least[:, None]
        least, which = cost.view(tiles, overlaps, branches).min(2)
        chosen.append(which.to(torch.int16))
    at = least.argmin(1) if seam is None else seam
    states = []
    for which in reversed(chosen):
        state = at * branches + which.gather(1, at[:, None])[:, 0].long()
        states.append(state)
        at = state % overlaps
    return torch.stack(states[::-1], 1)
