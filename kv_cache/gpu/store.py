"""Quantizes new keys and values into pages on a CUDA device: the host's side of ``csrc/store.cu``."""

from __future__ import annotations

import ctypes

import torch

from kv_cache.errors import ParetoError
from kv_cache.gpu.launch import load_kernel
from kv_cache.gpu.sides import Side
from kv_cache.layout import PageLayout

INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TOKENS, THREADS = 16, 128
"""Tokens and threads of a thread block, as ``csrc/store.cu`` has them."""
TENSORS = ("inverse", "zero", "encode", "feedback", "mean", "fine", "anchors")

_i32, _i64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Params(ctypes.Structure):
    _fields_ = (
        ("cache", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("x", _ptr),
        ("token_stride", _i64),
        ("x_head_stride", _i64),
        ("slots", _ptr),
        ("positions", _ptr),
        *((name, _ptr) for name in TENSORS),
        ("tokens", _i32),
        ("plane", _i32),
        ("high_plane", _i32),
        ("meta_plane", _i32),
    )


def store(
    layout: PageLayout,
    sides: tuple[Side, Side],
    cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> None:
    """Quantize tokens and write them into their slots, bit for bit as :func:`kv_cache.codec.write_pages`.

    Args:
        layout: of a page.
        sides: keys and values of the layer (:func:`kv_cache.gpu.sides.make_side`).
        cache: uint8 [blocks, KV heads, block_size, bytes per token] on CUDA, of any block and head stride that is a
            multiple of 4 bytes.
        key: [tokens, KV heads, head_dim] float32, bfloat16 or float16, channels contiguous; ``value`` likewise.
        slots: int64 [at most tokens], ``block * block_size + offset``; negative ones are skipped. Tokens beyond its
            length are padding.
        positions: int64, as many as slots: of each token in its sequence; needed for centred keys, and below the number
            of positions that the side was made for, which only the caller can see to.

    Raises:
        ParetoError: positions are missing.

    """
    count = min(slots.shape[0], key.shape[0])
    if sides[0].centred and (positions is None or positions.shape[0] < count):
        raise ParetoError(f"{layout.fmt.name}: centred keys need the position of every token")
    if not count:
        return
    for x, side in zip((key, value), sides, strict=True):
        kernel = load_kernel("store.cu", "store", (*side.macros.items(), ("INPUT", INPUTS[x.dtype])), cache.device)
        params = _Params(
            cache=cache.data_ptr(),
            block_stride=cache.stride(0),
            head_stride=cache.stride(1),
            x=x.data_ptr(),
            token_stride=x.stride(0),
            x_head_stride=x.stride(1),
            slots=slots.data_ptr(),
            positions=None if positions is None else positions.data_ptr(),
            tokens=count,
            **side.offsets,
            **{name: side.tensors[name].data_ptr() for name in TENSORS if name in side.tensors},
        )
        kernel.launch((-(-count // TOKENS), cache.shape[1], 1), THREADS, params, cache.device)
