"""Quantizes new keys and values into pages on a CUDA device: the host's side of ``csrc/store.cu``."""

from __future__ import annotations

import ctypes

import torch

from kv_cache import codec
from kv_cache.cuda.constants import TOKENS, Centres, LayerConstants, PlaneOffsets, aligned
from kv_cache.cuda.launch import load_kernel
from kv_cache.cuda.runtime.device import device_limits
from kv_cache.cuda.runtime.launch import Kernel
from kv_cache.doors import expect, is_vector
from kv_cache.errors import ParetoError

INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LANES = {64: 4, 80: 8, 96: 8, 128: 8, 256: 16}
"""That share a token, by head size: ``csrc/rows.cuh``."""
_i32, _i64, _ptr, _f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Side(ctypes.Structure):
    _fields_ = (
        ("x", _ptr),
        ("token_stride", _i64),
        ("head_stride", _i64),
        ("planes", PlaneOffsets),
        ("range_scale", _f32),
        ("range_zero", _f32),
        ("gain", _f32),
    )


class _Params(ctypes.Structure):
    _fields_ = (
        ("cache", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("slots", _ptr),
        ("positions", _ptr),
        ("centres", Centres),
        ("transform", _ptr),
        ("value_encode", _ptr),
        ("value_mirror", _ptr),
        ("sides", _Side * 2),
        ("tokens", _i32),
        ("meta", _i32),
    )


def store(
    layer: LayerConstants,
    cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> bool:
    """Quantize tokens and write them into their slots, as :func:`kv_cache.codec.write_pages`.

    Values are coded bit for bit so. Keys are transformed with another rounding, of 16 bits: a byte of a key differs
    where a number lies next to a tie.

    Args:
        layer: its constants.
        cache: uint8 [blocks, KV heads, block_size, bytes per token] on CUDA, of any block and head stride that is a
            multiple of 4 bytes.
        key: [tokens, KV heads, head_dim] float32, bfloat16 or float16; ``value`` likewise.
        value: see ``key``.
        slots: int64 [at most tokens], ``block * block_size + offset``; negative ones are skipped. Tokens beyond its
            length are padding.
        positions: int64 [as many as slots or more], of each stored token in its sequence, below the number of positions
            that the constants were made for, which only the caller can see to.

    Returns:
        Whether the next launch may run beside this one without waiting for it, if it reads nothing that this one
        writes: this one has then waited for all before it. Only beside few tokens: many fill the device, and nothing
        is gained by starting sooner.

    Raises:
        ParetoError: pages of another layout, positions missing, or keys of a dtype that is not served.

    """
    layer.verify(cache)
    count, name = min(slots.shape[0], key.shape[0]), layer.layout.fmt.name
    if positions.shape[0] < count:
        raise ParetoError(f"{name}: keys need the position of every token")
    if key.dtype not in INPUTS or value.dtype != key.dtype:
        raise ParetoError(f"{name}: keys and values must both be float32, bfloat16 or float16")
    rows = (layer.kv_heads, layer.layout.head_dim)
    expect(
        f"{name} store",
        (
            (key.dim() == 3 and tuple(key.shape[1:]) == rows and key.shape == value.shape, f"[tokens, {rows}]"),
            (is_vector(slots, torch.int64), "contiguous int64 slots"),
            (is_vector(positions, torch.int64), "contiguous int64 positions"),
            (all(t.device == cache.device for t in (key, value, slots, positions)), f"tensors on {cache.device}"),
        ),
    )
    if not count:
        return False
    sides = (_Side * 2)()
    inputs = [aligned(x) for x in (key, value)]
    for side, x, planes, bits in zip(sides, inputs, layer.planes, _bits(layer), strict=True):
        side.x, (side.token_stride, side.head_stride, _), side.planes = x.data_ptr(), x.stride(), planes
        side.range_scale, side.range_zero, side.gain = codec.factors(bits)
    params = _Params(
        cache=cache.data_ptr(),
        block_stride=cache.stride(0),
        head_stride=cache.stride(1),
        slots=slots.data_ptr(),
        positions=positions.data_ptr(),
        centres=layer.centres,
        sides=sides,
        tokens=count,
        meta=layer.meta,
        **{name: layer.addresses[name] for name in ("transform", "value_encode", "value_mirror")},
    )
    device = cache.device
    processors, _, overlap = device_limits(device)
    groups, heads = -(-count // TOKENS), layer.kv_heads
    few = groups * heads <= processors
    warps = _warps(layer.layout.head_dim, few)
    grid = (groups, heads, 2) if few else (min(groups, max(processors * _resident(warps) // heads, 1)), heads, 1)
    _kernel(layer, few, key.dtype, device).launch(grid, 32 * warps, params, device, overlap)
    return overlap and few


def preload(layer: LayerConstants, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load what :func:`store` launches, so that no request waits for it."""
    for few in (True, False):
        _kernel(layer, few, dtype, device)


def _bits(layer: LayerConstants) -> tuple[int, int]:
    return layer.layout.fmt.key_bits, layer.layout.fmt.value_bits


def _warps(dim: int, few: bool) -> int:
    """Return the warps of a block, which share the columns of a head."""
    # With 32 columns a warp, the tokens' operands are read half as often as with 16. Of other head sizes such warps
    # would be too few for 16 tokens (64, 96), not come out even (80) or lack registers (256).
    return dim // (32 if dim == 128 and not few else 16)


def _resident(warps: int) -> int:
    """Return the blocks of a multiprocessor, whose registers suffice for 16 such warps or nearly so."""
    return max(16 // warps, 1)


def _shared_bytes(dim: int) -> int:
    """Return the size of ``Scratch`` in ``csrc/store.cu``."""
    return TOKENS * 4 * (2 * (dim // 2 + 4) + dim + 8 + 5 * LANES[dim])


def _kernel(layer: LayerConstants, few: bool, dtype: torch.dtype, device: torch.device) -> Kernel:
    dim = layer.layout.head_dim
    warps, shared = _warps(dim, few), _shared_bytes(dim)
    macros = (
        *layer.macros,
        ("INPUT", INPUTS[dtype]),
        ("WARPS", warps),
        ("RESIDENT", 1 if few else _resident(warps)),
        ("SHARED_BYTES", shared),
        ("PARAMS_BYTES", ctypes.sizeof(_Params)),
    )
    return load_kernel("store.cu", "store", macros, device, shared, few)
