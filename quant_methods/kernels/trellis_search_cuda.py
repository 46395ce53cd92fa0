"""The search for the streams of a trellis code on a CUDA device: the host's side of ``csrc/trellis_search.cu``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kv_cache.cuda.runtime.device import device_limits
from kv_cache.cuda.runtime.launch import load_kernel
from quant_methods.formats.parts.trellis import STATES, TILE_PAIRS, pair_values
from quant_methods.kernels.low_bit_matrix import FOLDER, PAIR_MACROS

THREADS = 1024
HISTORY_BYTES = 600 << 20
"""Of the least costs of all steps, at most."""

_ptr, _i32, _f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class _Params(ctypes.Structure):
    _fields_ = (
        ("targets", _ptr),
        ("weights", _ptr),
        ("states", _ptr),
        ("history", _ptr),
        ("largest", _f32),
        ("tiles", _i32),
    )


def search_on_cuda(targets: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Search on the targets' device, which may be captured in a graph; see ``trellis_search.search``."""
    targets, device = targets.contiguous(), targets.device
    given = None if weights is None else weights.contiguous()
    states = torch.empty(targets.shape[:2], dtype=torch.int32, device=device)
    if not len(targets):
        return states.long()
    side, blocks = sharing(len(targets), bits, device_limits(device)[0])
    history = torch.empty(blocks * _history_numbers(bits, side), dtype=torch.float32, device=device)
    shared_bytes = _shared_bytes(bits, side)
    kernel = load_kernel(
        "trellis_search.cu", "search", macros(bits, side, given is not None), device, shared_bytes, folder=FOLDER
    )
    place = None if given is None else given.data_ptr()
    params = _Params(targets.data_ptr(), place, states.data_ptr(), history.data_ptr(), _largest(), len(targets))
    kernel.launch((blocks, 1, 1), THREADS, params, device)
    return states.long()


def sharing(tiles: int, bits: int, processors: int) -> tuple[int, int]:
    """Return how many tiles a thread block searches together, and how many blocks there are.

    Of about 13 + 4 x tiles instructions a state, 13 say what it means, which tiles of a block share; a tile more for
    each is the better as long as no multiprocessor is left without.
    """
    found = []
    for side in (1, 2, 4):
        groups = -(-tiles // side)
        blocks = min(groups, processors)
        if side == 1 or blocks * 4 * _history_numbers(bits, side) <= HISTORY_BYTES:
            found.append((-(-groups // blocks) * (13 + 4 * side), side, blocks))
    return min(found)[1:]


def macros(bits: int, side: int, weighted: bool) -> tuple[tuple[str, int], ...]:
    """Return what ``search`` is compiled with."""
    own = {"BITS": bits, "SIDE": side, "WEIGHTED": int(weighted)}
    own |= {"PARAMS_BYTES": ctypes.sizeof(_Params), "SHARED_BYTES": _shared_bytes(bits, side)}
    return (*own.items(), *PAIR_MACROS.items())


def _history_numbers(bits: int, side: int) -> int:
    return TILE_PAIRS * (STATES >> 2 * bits) * side


def _shared_bytes(bits: int, side: int) -> int:
    overlaps = STATES >> 2 * bits
    numbers = 5 * TILE_PAIRS + 2 * overlaps + (THREADS if overlaps < THREADS else 1)
    return -(-4 * side * numbers // 16) * 16


@functools.cache
def _largest() -> float:
    return float(pair_values().abs().max())
