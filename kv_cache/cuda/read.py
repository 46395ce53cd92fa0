"""Gathers earlier and fresh keys and values for FlashAttention on a CUDA device: the host's side of
``csrc/read_tiles.cu`` and of ``csrc/read.cu``, which serves scales in the page and heads that the former cannot."""

from __future__ import annotations

import ctypes

import torch

from kv_cache.cuda.launch import load_kernel
from kv_cache.cuda.runtime.launch import Kernel
from kv_cache.cuda.runtime.device import device_limits
from kv_cache.cuda.sides import CENTRES, Side, aligned, tile_macros
from kv_cache.layout import PageLayout

TOKENS, THREADS = 16, 128
"""Tokens and threads of a thread block of ``csrc/read.cu``; a warp of ``csrc/read_tiles.cu`` reads as many tokens."""
WARPS = 8
FRESH = -1
"""In place of a tile's request: its tokens are fresh ones."""

_i32, _i64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Params(ctypes.Structure):
    _fields_ = (
        ("cache", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("out", _ptr),
        ("token_stride", _i64),
        ("out_head_stride", _i64),
        ("fresh", _ptr),
        ("fresh_token_stride", _i64),
        ("fresh_head_stride", _i64),
        ("block_table", _ptr),
        ("table_stride", _i64),
        ("tiles", _ptr),
        *((name, _ptr) for name in ("scale", "zero", *CENTRES)),
        ("plane", _i32),
        ("high_plane", _i32),
        ("meta_plane", _i32),
    )


class _TileSide(ctypes.Structure):
    _fields_ = (
        ("out", _ptr),
        ("token_stride", _i64),
        ("head_stride", _i64),
        ("fresh", _ptr),
        ("fresh_token_stride", _i64),
        ("fresh_head_stride", _i64),
        ("scale", _ptr),
        ("zero", _ptr),
        ("plane", _i32),
        ("high_plane", _i32),
    )


class _TileParams(ctypes.Structure):
    _fields_ = (
        ("cache", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("block_table", _ptr),
        ("table_stride", _i64),
        ("tiles", _ptr),
        ("count", _i32),
        *((name, _ptr) for name in ("decode", "bias", *CENTRES)),
        ("sides", _TileSide * 2),
    )


def plan(earlier: list[int], fresh: list[int]) -> torch.Tensor:
    """Return the tiles that gather each request's keys: its earlier tokens, then its fresh ones.

    Args:
        earlier: tokens of each request that are read from pages, from its first on.
        fresh: tokens of each request after those; they lie one request after the other.

    Returns:
        int32 [tiles, 4] on the CPU: request or FRESH, first token in it or of the fresh ones, tokens, row of that
        token among all keys.

    """
    tiles, row, taken = [torch.empty(0, 4, dtype=torch.int32)], 0, 0
    for request, (before, new) in enumerate(zip(earlier, fresh, strict=True)):
        for name, start, length in ((request, 0, before), (FRESH, taken, new)):
            first = torch.arange(0, length, TOKENS, dtype=torch.int32)
            counts = (length - first).clamp_max(TOKENS)
            tiles.append(torch.stack([torch.full_like(first, name), start + first, counts, row + first], 1))
            row += length
        taken += new
    return torch.cat(tiles)


def gather(
    layout: PageLayout,
    sides: tuple[Side, Side],
    cache: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    fresh: tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    tiles: torch.Tensor,
) -> None:
    """Gather keys and values, earlier ones as :func:`kv_cache.codec.read_page` rounded to the output's dtype.

    Args:
        layout: of a page.
        sides: keys and values of the layer.
        cache: uint8 [blocks, KV heads, block_size, bytes per token] on CUDA, of any block and head stride that is a
            multiple of 4 bytes.
        out: keys and values, bfloat16 or float16 [rows, KV heads, head_dim], contiguous; the tiles' rows are written.
        fresh: keys and values of out's dtype [fresh tokens, KV heads, head_dim], channels contiguous.
        block_table: int32 [requests, blocks], rows contiguous.
        tiles: of :func:`plan`, on the device.

    """
    if not len(tiles):
        return
    fresh = (aligned(fresh[0]), aligned(fresh[1]))
    if all(side.read_tiled for side in sides):
        _gather_tiles(layout, sides, cache, out, fresh, block_table, tiles)
        return
    for side, to, new in zip(sides, out, fresh, strict=True):
        pointers = side.pointers("scale", "zero", *CENTRES)
        if "decode" in side.tensors:
            pointers["scale"] = side.tensors["decode"].data_ptr()
        params = _Params(
            cache=cache.data_ptr(),
            block_stride=cache.stride(0),
            head_stride=cache.stride(1),
            out=to.data_ptr(),
            token_stride=to.stride(0),
            out_head_stride=to.stride(1),
            fresh=new.data_ptr(),
            fresh_token_stride=new.stride(0),
            fresh_head_stride=new.stride(1),
            block_table=block_table.data_ptr(),
            table_stride=block_table.stride(0),
            tiles=tiles.data_ptr(),
            **side.offsets,
            **pointers,
        )
        grid = (len(tiles), cache.shape[1], 1)
        _side_kernel(side, to.dtype, cache.device).launch(grid, THREADS, params, cache.device)


def preload(layout: PageLayout, sides: tuple[Side, Side], dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load what :func:`gather` launches, so that no request waits for it."""
    if all(side.read_tiled for side in sides):
        _tile_kernel(layout, sides, dtype, device)
    else:
        for side in sides:
            _side_kernel(side, dtype, device)


def _side_kernel(side: Side, dtype: torch.dtype, device: torch.device) -> Kernel:
    kept = {name: value for name, value in side.macros.items() if name != "FEEDBACK"}
    return load_kernel("read.cu", "read", (*kept.items(), _dtype_macro(dtype)), device)


def _shared_bytes(layout: PageLayout, keys: Side) -> int:
    """Return the shared memory of a block of csrc/read_tiles.cu: the transform and a row of results for each token."""
    if "decode" not in keys.tensors:
        return 0
    return keys.tensors["decode"][0].nbytes + WARPS * TOKENS * (layout.head_dim // 2 + 4) * 4


def _tile_kernel(layout: PageLayout, sides: tuple[Side, Side], dtype: torch.dtype, device: torch.device) -> Kernel:
    macros = (*tile_macros(sides), ("WARPS", WARPS), _dtype_macro(dtype))
    return load_kernel("read_tiles.cu", "read_tiles", macros, device, _shared_bytes(layout, sides[0]))


def _dtype_macro(dtype: torch.dtype) -> tuple[str, int]:
    return "OUT_BFLOAT", int(dtype == torch.bfloat16)


def _gather_tiles(
    layout: PageLayout,
    sides: tuple[Side, Side],
    cache: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    fresh: tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    tiles: torch.Tensor,
) -> None:
    keys = sides[0]
    tile_sides = [
        _TileSide(
            out=to.data_ptr(),
            token_stride=to.stride(0),
            head_stride=to.stride(1),
            fresh=new.data_ptr(),
            fresh_token_stride=new.stride(0),
            fresh_head_stride=new.stride(1),
            plane=side.offsets["plane"],
            high_plane=side.offsets["high_plane"],
            **side.pointers("scale", "zero"),
        )
        for side, to, new in zip(sides, out, fresh, strict=True)
    ]
    params = _TileParams(
        cache=cache.data_ptr(),
        block_stride=cache.stride(0),
        head_stride=cache.stride(1),
        block_table=block_table.data_ptr(),
        table_stride=block_table.stride(0),
        tiles=tiles.data_ptr(),
        count=len(tiles),
        sides=(_TileSide * 2)(*tile_sides),
        **keys.pointers("decode", "bias", *CENTRES),
    )
    # As many blocks as the shared memory leaves room for.
    blocks = 2 if "decode" in keys.tensors else 8
    processors, _, _ = device_limits(cache.device)
    most = -(-len(tiles) // WARPS)
    grid = (max(min(most, blocks * processors // (2 * cache.shape[1])), 1), cache.shape[1], 2)
    _tile_kernel(layout, sides, out[0].dtype, cache.device).launch(grid, 32 * WARPS, params, cache.device)
