"""Gathers earlier and fresh keys and values for FlashAttention on CUDA: the host's side of ``csrc/read.cu``."""

from __future__ import annotations

import ctypes
import functools

import torch

from kv_cache.cuda.constants import TOKENS, Centres, LayerConstants, PlaneOffsets, aligned
from kv_cache.cuda.launch import load_kernel
from kv_cache.cuda.runtime.device import device_limits
from kv_cache.cuda.runtime.launch import Kernel
from kv_cache.doors import expect, is_table
from kv_cache.errors import ParetoError

OUTPUTS = {torch.bfloat16: 1, torch.float16: 0}
FRESH = -1
"""In place of a tile's request: its tokens are fresh ones."""
MOST_WARPS = 16
"""Of a block: then the sums of a warp still fit into registers."""
MOST_SHARED_MATRIX = 128
"""Largest head whose inverse transform lies in shared memory."""

_i32, _i64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Side(ctypes.Structure):
    _fields_ = (
        ("out", _ptr),
        ("token_stride", _i64),
        ("head_stride", _i64),
        ("fresh", _ptr),
        ("fresh_token_stride", _i64),
        ("fresh_head_stride", _i64),
        ("planes", PlaneOffsets),
    )


class _Params(ctypes.Structure):
    _fields_ = (
        ("cache", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("block_table", _ptr),
        ("table_stride", _i64),
        ("tiles", _ptr),
        ("inverse", _ptr),
        ("row_sums", _ptr),
        ("centres", Centres),
        ("value_decode", _ptr),
        ("value_mirror", _ptr),
        ("sides", _Side * 2),
        ("count", _i32),
        ("meta", _i32),
    )


def plan(earlier: list[int], fresh: list[int]) -> torch.Tensor:
    """Return the tiles that gather each request's keys: its earlier tokens, then its fresh ones.

    Tiles of earlier tokens start at multiples of TOKENS, so that each lies in one page.

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
    layer: LayerConstants,
    cache: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    fresh: tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    tiles: torch.Tensor,
) -> None:
    """Gather keys and values, earlier ones as :func:`kv_cache.codec.read_page` rounded to the output's dtype.

    Args:
        layer: its constants.
        cache: uint8 [blocks, KV heads, block_size, bytes per token] on CUDA, of any block and head stride that is a
            multiple of 4 bytes.
        out: keys and values, bfloat16 or float16 [rows, KV heads, head_dim], contiguous; the tiles' rows are written.
        fresh: keys and values of out's dtype [fresh tokens, KV heads, head_dim].
        block_table: int32 [requests, blocks], rows contiguous.
        tiles: of :func:`plan`, on the device.

    Raises:
        ParetoError: pages of another layout, or outputs that are not served.

    """
    layer.verify(cache)
    dtype, rows = out[0].dtype, (layer.kv_heads, layer.layout.head_dim)
    if dtype not in OUTPUTS or any(x.dtype != dtype or x.shape[1:] != rows for x in (*out, *fresh)):
        raise ParetoError(
            f"{layer.layout.fmt.name}: keys and values to gather must be bfloat16 or float16 [tokens, {rows}]"
        )
    expect(
        f"{layer.layout.fmt.name} gather",
        (
            (all(x.is_contiguous() for x in out), "contiguous outputs"),
            (is_table(block_table, torch.int32), "an int32 block table with contiguous rows"),
            (tiles.dtype == torch.int32 and tiles.is_contiguous() and tiles.shape[1:] == (4,), "int32 tiles [n, 4]"),
            (all(x.device == cache.device for x in (*out, *fresh, block_table, tiles)), f"tensors on {cache.device}"),
        ),
    )
    if not len(tiles):
        return
    sides = (_Side * 2)()
    inputs = [aligned(x) for x in fresh]
    for side, to, new, planes in zip(sides, out, inputs, layer.planes, strict=True):
        side.out, (side.token_stride, side.head_stride, _) = to.data_ptr(), to.stride()
        side.fresh, (side.fresh_token_stride, side.fresh_head_stride, _) = new.data_ptr(), new.stride()
        side.planes = planes
    params = _Params(
        cache=cache.data_ptr(),
        block_stride=cache.stride(0),
        head_stride=cache.stride(1),
        block_table=block_table.data_ptr(),
        table_stride=block_table.stride(0),
        tiles=tiles.data_ptr(),
        centres=layer.centres,
        sides=sides,
        count=len(tiles),
        meta=layer.meta,
        **{name: layer.addresses[name] for name in ("inverse", "row_sums", "value_decode", "value_mirror")},
    )
    device = cache.device
    processors, limit, _ = device_limits(device)
    warps = _warps(layer, limit)
    # A block for each multiprocessor, as its shared memory has room for one.
    blocks = min(-(-len(tiles) // warps), max(processors // layer.kv_heads, 1))
    _kernel(layer, dtype, device).launch((blocks, layer.kv_heads, 1), 32 * warps, params, device)


def preload(layer: LayerConstants, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load what :func:`gather` launches, so that no request waits for it."""
    _kernel(layer, dtype, device)


def _shared_bytes(dim: int, warps: int) -> int:
    """Return the shared memory of a block of ``csrc/read.cu``: each warp's codes and results, and the transform."""
    shares = dim <= MOST_SHARED_MATRIX
    codes, results, matrix = TOKENS * (dim // 2 + 4) * 4, TOKENS * (dim + 8) * 4, 4 * dim * dim
    return warps * (results if shares else codes + results) + (matrix if shares else 0)


@functools.cache
def _most_warps(dim: int, limit: int) -> int:
    return next(warps for warps in range(MOST_WARPS, 0, -1) if _shared_bytes(dim, warps) <= limit)


def _warps(layer: LayerConstants, limit: int) -> int:
    return _most_warps(layer.layout.head_dim, limit)


def _kernel(layer: LayerConstants, dtype: torch.dtype, device: torch.device) -> Kernel:
    warps = _warps(layer, device_limits(device)[1])
    shared = _shared_bytes(layer.layout.head_dim, warps)
    macros = (
        *layer.macros,
        ("OUT_BFLOAT", OUTPUTS[dtype]),
        ("WARPS", warps),
        ("SHARED_BYTES", shared),
        ("PARAMS_BYTES", ctypes.sizeof(_Params)),
    )
    return load_kernel("read.cu", "read", macros, device, shared)
