"""Reads earlier tokens back from pages on a CUDA device: the host's side of ``csrc/read.cu``."""

from __future__ import annotations

import ctypes

import torch

from kv_cache.gpu.launch import load_kernel
from kv_cache.gpu.sides import Side

TOKENS, THREADS = 16, 128
"""Tokens and threads of a thread block, as ``csrc/read.cu`` has them."""

_i32, _i64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Params(ctypes.Structure):
    _fields_ = (
        ("cache", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("out", _ptr),
        ("token_stride", _i64),
        ("out_head_stride", _i64),
        ("block_table", _ptr),
        ("table_stride", _i64),
        ("tiles", _ptr),
        *((name, _ptr) for name in ("scale", "zero", "mean", "fine", "anchors")),
        ("plane", _i32),
        ("high_plane", _i32),
        ("meta_plane", _i32),
    )


def plan(lengths: list[int], rows: list[int]) -> torch.Tensor:
    """Return the tiles of requests whose first tokens are read.

    Args:
        lengths: tokens to read of each request, from its first on.
        rows: of the output, where each request's first token goes.

    Returns:
        int32 [tiles, 4] on the CPU: request, first token, tokens, row of that token.

    """
    tiles = []
    for request, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        first = torch.arange(0, length, TOKENS, dtype=torch.int32)
        tiles.append(
            torch.stack([torch.full_like(first, request), first, (length - first).clamp_max(TOKENS), row + first], 1)
        )
    return torch.cat(tiles) if tiles else torch.empty(0, 4, dtype=torch.int32)


def read(side: Side, cache: torch.Tensor, out: torch.Tensor, block_table: torch.Tensor, tiles: torch.Tensor) -> None:
    """Read keys or values back, as :func:`kv_cache.codec.read_page`, rounded to the output's dtype.

    Args:
        side: keys or values of the layer.
        cache: uint8 [blocks, KV heads, block_size, bytes per token] on CUDA.
        out: bfloat16 or float16 [rows, KV heads, head_dim], channels contiguous; the tiles' rows are written.
        block_table: int32 [requests, blocks], rows contiguous.
        tiles: of :func:`plan`, on the device.

    """
    if not len(tiles):
        return
    kept = {name: value for name, value in side.macros.items() if name != "FEEDBACK"}
    kernel = load_kernel(
        "read.cu", "read", (*kept.items(), ("OUT_BFLOAT", int(out.dtype == torch.bfloat16))), cache.device
    )
    tensors = {
        name: side.tensors[name] for name in ("scale", "zero", "mean", "fine", "anchors") if name in side.tensors
    }
    if "decode" in side.tensors:
        tensors["scale"] = side.tensors["decode"]
    params = _Params(
        cache=cache.data_ptr(),
        block_stride=cache.stride(0),
        head_stride=cache.stride(1),
        out=out.data_ptr(),
        token_stride=out.stride(0),
        out_head_stride=out.stride(1),
        block_table=block_table.data_ptr(),
        table_stride=block_table.stride(0),
        tiles=tiles.data_ptr(),
        **side.offsets,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    kernel.launch((len(tiles), cache.shape[1], 1), THREADS, params, cache.device)
