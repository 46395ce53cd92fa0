"""Input channels kept apart and a low-rank product, added to the bulk's result in one launch, in Triton.

``quant_methods.kernels.beside.add_beside_in_torch`` is its specification. A program owns a tile of the result, ROWS
output channels of TOKENS tokens. To the bulk's result there it adds products of small tiles on the tensor cores, with
sums in float32. Another kernel adds all but the low-rank product to an expanded weight, single weights too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kv_cache.cuda.runtime.device import device_limits
from kv_cache.doors import expect, is_table, is_vector
from quant_methods.kernels.beside import BesideParts

DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (8, 16, 32, 64)
"""Numbers of tokens that there are kernels for; others take the next larger one."""
MOST_ROWS, MOST_TOKENS = 128, 32
"""Of a program."""
ENOUGH_PROGRAMS = 128
"""That keep a device busy; tiles grow, which reads inputs less often, while as many programs are left."""
MOST_CHANNELS = 256
"""Of kept columns, or of a low-rank product, at once: all are asked for before any is waited for."""
SMALL = 1024
"""Numbers of a tile above which half as many have to do, for lack of registers and shared memory."""
REGISTERS = 128
"""Allowed a thread. Told nothing, ptxas keeps to 32 where it can, and waits for some loads before it starts others."""


@triton.jit
def _dense(
    total, x, index, ends, row, token, asked, there, out, channels, x_token,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Return the total [tokens, rows] with some input channels' products added; ends is [channels, out]."""
    for part in tl.static_range(CHUNKS):
        at = part * CHUNK + tl.arange(0, CHUNK)
        inside = at < channels
        channel = at
        if INDEXED:
            channel = tl.load(index + at, mask=inside, other=0)
        weight = tl.load(ends + at[:, None] * out + row[None, :], mask=inside[:, None] & there[None, :], other=0)
        begun = tl.load(x + token[:, None] * x_token + channel[None, :], mask=asked[:, None] & inside[None, :], other=0)
        total = tl.dot(begun, weight, total)
    return total


@triton.jit(do_not_specialize=["tokens", "kept", "rank"])
def _add(
    y, x, low, index, ends, result,
    tokens, out, kept, rank, y_token, x_token, low_token, result_token,
    KEPT: tl.constexpr, KEPT_CHUNKS: tl.constexpr, RANK: tl.constexpr, RANK_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write a tile of the result; see :func:`add`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there, asked = row < out, token < tokens
    mine = asked[:, None] & there[None, :]
    if not OVERLAP:
        # Asked for first and needed last.
        bulk = tl.load(y + token[:, None] * y_token + row[None, :], mask=mine, other=0)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    if KEPT_CHUNKS:
        total = _dense(
            total, x, index, ends, row, token, asked, there, out, kept, x_token,
            KEPT, KEPT_CHUNKS, True,
        )  # fmt: skip
    if RANK_CHUNKS:
        total = _dense(
            total, low, index, ends + kept * out, row, token, asked, there, out, rank, low_token,
            RANK, RANK_CHUNKS, False,
        )  # fmt: skip
    if OVERLAP:
        gdc_wait()
        bulk = tl.load(y + token[:, None] * y_token + row[None, :], mask=mine, other=0)
    total += bulk.to(tl.float32)
    tl.store(result + token[:, None] * result_token + row[None, :], total.to(result.dtype.element_ty), mask=mine)


def tile(out: int, tokens: int) -> tuple[int, int]:
    """Return the output channels and tokens of a program.

    Args:
        out: output channels.
        tokens: one of ``TOKENS``.

    """
    rows, own, most = 32, TOKENS[0], min(tokens, MOST_TOKENS)
    while out * tokens // (2 * rows * own) >= ENOUGH_PROGRAMS and (rows < MOST_ROWS or own < most):
        rows, own = (2 * rows, own) if rows < MOST_ROWS else (rows, 2 * own)
    return rows, own


def add(
    y: Tensor, x: Tensor, low: Tensor | None, index: Tensor | None, ends: Tensor, result: Tensor | None = None
) -> Tensor:
    """Return the bulk's result with kept columns and a low-rank product added.

    See :func:`quant_methods.kernels.beside.add_beside`. There is at least one token, and at most ``TOKENS[-1]``.

    Args:
        y: [tokens, out], rows' elements lie together.
        x: [tokens, in], rows' elements lie together.
        low: inputs of a low-rank product's second matrix, or None.
        index: input channels kept apart, or None; there is one of the two.
        ends: weights of both.
        result: where to write it, or None for a new tensor. If it is given, the kernel before this one is the one that
            writes y, and lets the next one start no sooner than all before it have ended: what does not need y is then
            done while it runs (sm_90 and above).

    Raises:
        ParetoError: shapes, strides, dtypes or devices do not fit.

    """
    given = [tensor for tensor in (y, x, low, index, ends, result) if tensor is not None]
    expect(
        "the kernel of kept columns and low-rank products",
        (
            (y.dtype in DTYPES, f"16-bit numbers, not {y.dtype}"),
            (is_table(y, y.dtype), "outputs [tokens, out] whose rows have no gaps"),
            (0 < len(y) <= TOKENS[-1], f"1 to {TOKENS[-1]} tokens, not {len(y)}"),
            (
                is_table(x, y.dtype) and len(x) == len(y),
                "as many inputs [tokens, in] of their dtype, no gaps",
            ),
            (index is None or is_vector(index, torch.int32), "int32 channels kept apart, without gaps"),
            (low is not None or index is not None, "channels kept apart or a low-rank product"),
            (
                low is None or (is_table(low, y.dtype) and len(low) == len(y)),
                "inputs [tokens, rank] of the second matrix in their dtype, rows without gaps",
            ),
        ),
    )
    (tokens, out), bound = y.shape, next(most for most in TOKENS if most >= y.shape[0])
    kept, rank = 0 if index is None else len(index), 0 if low is None else low.shape[1]
    expect(
        "the kernel of kept columns and low-rank products",
        (
            (
                ends.dtype == y.dtype and ends.is_contiguous() and tuple(ends.shape) == (kept + rank, out),
                f"contiguous weights [{kept + rank}, {out}] of {y.dtype}",
            ),
            (
                result is None or (is_table(result, y.dtype) and result.shape == y.shape),
                "a result like the outputs, rows without gaps",
            ),
            (all(tensor.device == y.device for tensor in given), f"tensors on {y.device}"),
        ),
    )
    rows, own = tile(out, bound)
    most = MOST_CHANNELS if rows * own <= SMALL else MOST_CHANNELS // 2
    chunks = [min(max(triton.next_power_of_2(count), 16), most) for count in (kept, rank)]
    overlap = result is not None and device_limits(y.device)[2]
    result = y.new_empty(tokens, out) if result is None else result
    _add[(triton.cdiv(out, rows), triton.cdiv(tokens, own))](
        y, x, low, index, ends, result, tokens, out, kept, rank, y.stride(0), x.stride(0),
        0 if low is None else low.stride(0), result.stride(0), KEPT=chunks[0], KEPT_CHUNKS=triton.cdiv(kept, chunks[0]),
        RANK=chunks[1], RANK_CHUNKS=triton.cdiv(rank, chunks[1]), ROWS=rows, TOKENS=own, OVERLAP=overlap,
        num_warps=8 if rows == MOST_ROWS else 4, maxnreg=REGISTERS, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return result


MERGED_ROWS, MERGED_AT_ONCE = 16, 32
"""Rows of a program that adds to a weight, and the weights of each that it adds at once."""


@triton.jit(do_not_specialize=["first", "rows", "kept"])
def _merge(
    weight, index, ends, starts, inputs, values, first, rows, width, out, kept,
    KEPT: tl.constexpr, SPARSE: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add to some rows of a weight; see :func:`merge`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    own = weight + row.to(tl.int64)[:, None] * width
    if KEPT:
        for begin in range(0, kept, AT_ONCE):
            at = begin + tl.arange(0, AT_ONCE)
            inside = there[:, None] & (at < kept)[None, :]
            place = own + tl.load(index + at, mask=at < kept, other=0)[None, :]
            end = tl.load(ends + at[None, :] * out + first + row[:, None], mask=inside, other=0).to(tl.float32)
            tl.store(place, (tl.load(place, mask=inside, other=0) + end).to(weight.dtype.element_ty), mask=inside)
        # A single weight may lie in a channel kept apart, which another thread added to.
        tl.debug_barrier()
    if SPARSE:
        begin = tl.load(starts + first + row, mask=there, other=0)
        end = tl.load(starts + first + row + 1, mask=there, other=0)
        for done in range(0, tl.max(end - begin), AT_ONCE):
            at = begin[:, None] + done + tl.arange(0, AT_ONCE)[None, :]
            inside = at < end[:, None]
            place = own + tl.load(inputs + at, mask=inside, other=0)
            single = tl.load(values + at, mask=inside, other=0).to(tl.float32)
            tl.store(place, (tl.load(place, mask=inside, other=0) + single).to(weight.dtype.element_ty), mask=inside)


def merge(weight: Tensor, first: int, parts: BesideParts) -> None:
    """Add channels kept apart and single weights to rows of a layer's weight, in place, in one launch.

    See :func:`quant_methods.kernels.beside.add_to_weight`, which is its specification.

    Raises:
        ParetoError: shapes, strides, dtypes or devices do not fit.

    """
    channels, ends, starts, inputs, values = parts.channels, parts.ends, parts.starts, parts.inputs, parts.values
    given = [tensor for tensor in (channels, ends, starts, inputs, values) if tensor is not None]
    last = first + len(weight)
    expect(
        "the kernel that adds to a weight",
        (
            (weight.dtype in DTYPES, f"16-bit numbers, not {weight.dtype}"),
            (weight.dim() == 2 and weight.is_contiguous(), "a contiguous weight [rows, in]"),
            (channels is None or is_vector(channels, torch.int32), "int32 channels kept apart, without gaps"),
            (
                ends is None or (ends.dtype == weight.dtype and ends.dim() == 2 and ends.is_contiguous()),
                f"contiguous weights of channels kept apart, {weight.dtype}",
            ),
            (
                channels is None or (ends is not None and len(ends) >= len(channels) and ends.shape[1] >= last),
                f"weights of each channel kept apart for {last} output channels",
            ),
            (
                starts is None or (is_vector(starts, torch.int32) and first >= 0 and len(starts) > last),
                f"int32 starts of {last} output channels, without gaps",
            ),
            (
                starts is None
                or (
                    inputs is not None
                    and values is not None
                    and is_vector(inputs, torch.int32)
                    and is_vector(values, weight.dtype)
                    and len(inputs) == len(values)
                ),
                f"single weights of {weight.dtype} and an int32 channel for each, without gaps",
            ),
            (all(tensor.device == weight.device for tensor in given), f"tensors on {weight.device}"),
        ),
    )
    rows, width = weight.shape
    out = 0 if parts.ends is None else parts.ends.shape[1]
    _merge[(triton.cdiv(rows, MERGED_ROWS),)](
        weight, parts.channels, parts.ends, parts.starts, parts.inputs, parts.values, first, rows, width, out,
        parts.kept, KEPT=parts.kept > 0, SPARSE=parts.starts is not None, ROWS=MERGED_ROWS, AT_ONCE=MERGED_AT_ONCE,
    )  # fmt: skip
