"""Quantizes new keys and values into pages on a CUDA device: the host's side of ``csrc/store_tiles.cu`` and of
``csrc/store.cu``, which serves scales in the page and heads that are too large for the former."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from kv_cache.errors import ParetoError
from kv_cache.cuda.launch import load_kernel
from kv_cache.cuda.runtime.launch import Kernel
from kv_cache.cuda.runtime.device import device_limits
from kv_cache.cuda.sides import CENTRES, Side, aligned, tile_macros
from kv_cache.layout import PageLayout

INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TOKENS, THREADS = 16, 128
"""Tokens and threads of a thread block of ``csrc/store.cu``."""
TEAM_TOKENS = 32
"""Tokens that a team of warps of ``csrc/store_tiles.cu`` codes at a time."""
TENSORS = ("inverse", "zero", "encode", "feedback", *CENTRES)
TILE_TENSORS = ("inverse", "zero", "transform", "feedback", "own")
KEY_SHARE = 0.6
"""Of the thread blocks of a long prompt that code keys, which take a transform more than values do."""

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


class _TileSide(ctypes.Structure):
    _fields_ = (
        ("x", _ptr),
        ("token_stride", _i64),
        ("head_stride", _i64),
        *((name, _ptr) for name in TILE_TENSORS),
        ("plane", _i32),
        ("high_plane", _i32),
    )


class _TileParams(ctypes.Structure):
    _fields_ = (
        ("cache", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("slots", _ptr),
        ("positions", _ptr),
        *((name, _ptr) for name in CENTRES),
        ("tokens", _i32),
        ("key_blocks", _i32),
        ("sides", _TileSide * 2),
    )


def store(
    layout: PageLayout,
    sides: tuple[Side, Side],
    cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> bool:
    """Quantize tokens and write them into their slots, as :func:`kv_cache.codec.write_pages`.

    Bit for bit, but for channels that are rounded with feedback: a code may differ where the number rounded lies within
    1e-3 of the middle between two codes, and the codes after it follow from that one.

    Args:
        layout: of a page.
        sides: keys and values of the layer (:func:`kv_cache.cuda.sides.make_side`).
        cache: uint8 [blocks, KV heads, block_size, bytes per token] on CUDA, of any block and head stride that is a
            multiple of 4 bytes.
        key: [tokens, KV heads, head_dim] float32, bfloat16 or float16, channels contiguous; ``value`` likewise.
        slots: int64 [at most tokens], ``block * block_size + offset``; negative ones are skipped. Tokens beyond its
            length are padding.
        positions: int64, as many as slots: of each token in its sequence; needed for centred keys, and below the number
            of positions that the side was made for, which only the caller can see to.

    Returns:
        Whether the next launch may run beside this one without waiting for it, if it reads nothing that this one
        writes: this one has then waited for all before it.

    Raises:
        ParetoError: positions are missing.

    """
    count = min(slots.shape[0], key.shape[0])
    if sides[0].centred and (positions is None or positions.shape[0] < count):
        raise ParetoError(f"{layout.fmt.name}: centred keys need the position of every token")
    if not count:
        return False
    if all(side.tiled for side in sides):
        return _store_tiles(layout, sides, cache, key, value, slots[:count], positions)
    _store_each(sides, cache, key, value, slots[:count], positions)
    return False


def preload(layout: PageLayout, sides: tuple[Side, Side], dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load what :func:`store` launches, so that no request waits for it."""
    if all(side.tiled for side in sides):
        for few in (True, False):
            _tile_kernel(sides, _team(layout, sides, few, device), dtype, device)
    else:
        for side in sides:
            _side_kernel(side, dtype, device)


def _side_kernel(side: Side, dtype: torch.dtype, device: torch.device) -> Kernel:
    return load_kernel("store.cu", "store", (*side.macros.items(), ("INPUT", INPUTS[dtype])), device)


def _store_each(
    sides: tuple[Side, Side],
    cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor | None,
) -> None:
    count = slots.shape[0]
    for x, side in zip((key, value), sides, strict=True):
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
            **side.pointers(*TENSORS),
        )
        grid = (-(-count // TOKENS), cache.shape[1], 1)
        _side_kernel(side, x.dtype, cache.device).launch(grid, THREADS, params, cache.device)


def _shared_bytes(layout: PageLayout, sides: tuple[Side, Side], teams: int, size: int) -> int:
    """Return the shared memory of a block of teams of ``size`` warps: their scratch, as csrc/rounding.cuh lays it out,
    and the matrices."""
    turns = 2 if size > 1 else 1
    scratch = TEAM_TOKENS * ((layout.head_dim + 8) * 4 + turns * 2 * 12 * 4 + 8 + 8 + 4)
    return teams * scratch + max(side.matrix_bytes for side in sides)


@dataclass(frozen=True)
class _Team:
    """Warps of a block, those that share tokens, and the block's shared memory."""

    warps: int
    size: int
    shared_bytes: int


def _team(layout: PageLayout, sides: tuple[Side, Side], few: bool, device: torch.device) -> _Team:
    """Return how warps share the work: few tokens are waited for, many should keep all warps busy."""
    limit = device_limits(device)[1]
    for warps in (8,) if few else (8, 6, 4, 2, 1):
        size = warps if few else 1
        shared = _shared_bytes(layout, sides, warps // size, size)
        if shared <= limit:
            return _Team(warps, size, shared)
    raise ParetoError(f"{layout.fmt.name}: the matrices of a head do not fit into {limit} bytes of shared memory")


def _tile_kernel(sides: tuple[Side, Side], team: _Team, dtype: torch.dtype, device: torch.device) -> Kernel:
    macros = (
        *tile_macros(sides),
        ("KEY_FEEDBACK", sides[0].macros["FEEDBACK"]),
        ("VALUE_FEEDBACK", sides[1].macros["FEEDBACK"]),
        ("INPUT", INPUTS[dtype]),
        ("WARPS", team.warps),
        ("TEAM", team.size),
    )
    return load_kernel("store_tiles.cu", "store_tiles", macros, device, team.shared_bytes, team.size > 1)


def _store_tiles(
    layout: PageLayout,
    sides: tuple[Side, Side],
    cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor | None,
) -> bool:
    device, count, kv_heads = cache.device, slots.shape[0], cache.shape[1]
    processors, _, overlap = device_limits(device)
    team = _team(layout, sides, -(-count // TEAM_TOKENS) * 2 * kv_heads <= processors, device)
    inputs = [aligned(x) for x in (key, value)]
    tile_sides = [
        _TileSide(
            x=x.data_ptr(),
            token_stride=x.stride(0),
            head_stride=x.stride(1),
            plane=side.offsets["plane"],
            high_plane=side.offsets["high_plane"],
            **side.pointers(*TILE_TENSORS),
        )
        for x, side in zip(inputs, sides, strict=True)
    ]
    most = -(-count // (TEAM_TOKENS * team.warps // team.size))
    share = max(processors // kv_heads, 2)
    keys = max(min(most, round(share * KEY_SHARE)), 1)
    values = max(min(most, share - keys), 1)
    params = _TileParams(
        cache=cache.data_ptr(),
        block_stride=cache.stride(0),
        head_stride=cache.stride(1),
        slots=slots.data_ptr(),
        positions=None if positions is None else positions.data_ptr(),
        tokens=count,
        key_blocks=keys,
        sides=(_TileSide * 2)(*tile_sides),
        **sides[0].pointers(*CENTRES),
    )
    kernel = _tile_kernel(sides, team, key.dtype, device)
    kernel.launch((keys + values, kv_heads, 1), 32 * team.warps, params, device, overlap)
    return overlap
