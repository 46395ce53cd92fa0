"""The search for the streams of a trellis code on a CUDA device: the host's side of ``csrc/trellis_search.cu``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kv_cache.cuda.runtime.launch import load_kernel
from quant_methods.formats.parts.trellis import STATES, TILE_PAIRS
from quant_methods.kernels.low_bit_matrix import FOLDER, PAIR_MACROS

THREADS = 1024
MOST_BLOCKS = 1024
"""Tiles that are searched at once, at most."""

_ptr, _i32 = ctypes.c_void_p, ctypes.c_int32


class _Params(ctypes.Structure):
    _fields_ = (("targets", _ptr), ("weights", _ptr), ("states", _ptr), ("chosen", _ptr), ("tiles", _i32))


def search_on_cuda(targets: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Search on the targets' device, which may be captured in a graph; see ``trellis_search.search``."""
    targets, overlaps = targets.contiguous(), STATES >> 2 * bits
    given = None if weights is None else weights.contiguous()
    states = torch.empty(targets.shape[:2], dtype=torch.int32, device=targets.device)
    if not len(targets):
        return states.long()
    blocks, in_shared = min(len(targets), MOST_BLOCKS), bits > 2
    chosen = torch.empty(0 if in_shared else blocks * TILE_PAIRS * overlaps, dtype=torch.uint8, device=targets.device)
    macros = (("BITS", bits), ("PARAMS_BYTES", ctypes.sizeof(_Params)), *PAIR_MACROS)
    shared_bytes = 8 * overlaps + (TILE_PAIRS * overlaps if in_shared else 0)
    kernel = load_kernel("trellis_search.cu", "search", macros, targets.device, shared_bytes, folder=FOLDER)
    place = None if given is None else given.data_ptr()
    params = _Params(targets.data_ptr(), place, states.data_ptr(), chosen.data_ptr(), len(targets))
    kernel.launch((blocks, 1, 1), THREADS, params, targets.device)
    return states.long()
