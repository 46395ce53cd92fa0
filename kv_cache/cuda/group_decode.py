"""Paged decode attention over codes whose scales lie inside the page (``group`` formats), in Triton.

Specification and oracle is :func:`kv_cache.reference.paged_attention`. Two launches make up a call. In the first, each
program attends to a run of one request's tokens, a unit, with all query rows of one KV head (or a block of them); the
second merges the units of each row. Units are about equally long over the whole batch and are counted out on the
device, so that grids depend on shapes only and a call can be captured in a CUDA graph and replayed with other lengths
and block tables. Only this file needs Triton.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kv_cache.errors import ParetoError
from kv_cache.formats import GROUP_META_BYTES
from kv_cache.cuda.arguments import Geometry, cuda_device
from kv_cache.layout import PageLayout

PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_UNIT = 128
"""Least tokens of a unit: shorter ones cost more to merge than they save."""
NO_WINDOW = 2**30
_LOG2E = tl.constexpr(math.log2(math.e))
_REQUESTS = tl.constexpr(128)
"""Requests that the search for a unit's request takes at once."""
_UNITS = tl.constexpr(16)
"""Units of a row that are merged at once."""


@triton.jit
def _visible(seq_lens, query_start, request, requests, window):
    """Return how many tokens, the last of their sequence, some query token of each request sees; 0 for padding."""
    there = request < requests
    length = tl.load(seq_lens + request, mask=there, other=0)
    start = tl.load(query_start + request, mask=there, other=0)
    queries = tl.load(query_start + request + 1, mask=there, other=0) - start
    return tl.where(queries > 0, tl.minimum(length, queries - 1 + window), 0)


@triton.jit
def _unit_tokens(seq_lens, query_start, requests, window, budget, TILE: tl.constexpr, MIN: tl.constexpr):
    """Return the tokens of a unit, a multiple of TILE, with which the batch has at most budget + requests units."""
    total = 0
    for first in range(0, requests, _REQUESTS):
        request = first + tl.arange(0, _REQUESTS)
        total += tl.sum(_visible(seq_lens, query_start, request, requests, window))
    return tl.maximum(tl.cdiv(tl.cdiv(total, budget), TILE) * TILE, MIN)


@triton.jit
def _dequantize(
    page, slot, here, PLANE: tl.constexpr, META: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, META_BYTES: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the keys or values [tokens, columns] at some slots of pages, 0 where not here; columns as in _channels.

    The tensors have the axes (token, part of the byte, run, byte of the run): a run is the most channels that surely
    share a scale.
    """
    PARTS: tl.constexpr = 8 // BITS
    ROW: tl.constexpr = HEAD_DIM // PARTS
    part = tl.arange(0, PARTS)[None, :, None, None]
    run = tl.arange(0, RUNS)[None, None, :, None] * RUN
    byte = run + tl.arange(0, RUN)[None, None, None, :]
    page, slot, here = page[:, None, None, None], slot[:, None, None, None], here[:, None, None, None] & (run < ROW)
    raw = tl.load(page + PLANE + slot * ROW + byte, mask=here, other=0)
    codes = (raw >> (part * BITS).to(tl.uint8)) & (2**BITS - 1)
    group = (part * ROW + run) // GROUP_SIZE
    row_bytes: tl.constexpr = (HEAD_DIM + GROUP_SIZE - 1) // GROUP_SIZE * META_BYTES
    at = (page + META + slot * row_bytes + group * META_BYTES).to(tl.pointer_type(tl.int32))
    meta = tl.load(at, mask=here, other=0)
    scale = meta.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    x = codes.to(tl.float32) * scale + minimum
    return tl.reshape(x.to(DTYPE), (page.shape[0], PARTS * RUNS * RUN))


@triton.jit
def _channels(HEAD_DIM: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Return each column's channel, and whether there is one: columns are the parts of the bytes of a row, padded."""
    PARTS: tl.constexpr = 8 // BITS
    column = tl.arange(0, WIDTH)
    byte = column % (WIDTH // PARTS)
    return column // (WIDTH // PARTS) * (HEAD_DIM // PARTS) + byte, byte < HEAD_DIM // PARTS


@triton.jit(do_not_specialize=["table_stride", "requests", "window", "budget"])
def _attend(
    query, cache, table, seq_lens, query_start, partial, stats, query_token_stride, query_head_stride, block_stride,
    head_stride, table_stride, requests, window, budget, scale, soft_cap,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, META_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KEY_META: tl.constexpr, VALUE_META: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, TILE: tl.constexpr, MIN: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Attend to one unit with the rows of one block: accumulators into partial, maxima and sums of weights to stats."""
    unit, pair = tl.program_id(0), tl.program_id(1)
    kv_head, row_block = pair // ROW_BLOCKS, pair % ROW_BLOCKS
    tokens = _unit_tokens(seq_lens, query_start, requests, window, budget, TILE, MIN)
    # The unit belongs to the first request at whose end more units have been counted.
    request, first_unit, counted = 0, 0, 0
    for first in range(0, requests, _REQUESTS):
        index = first + tl.arange(0, _REQUESTS)
        units = tl.cdiv(_visible(seq_lens, query_start, index, requests, window), tokens)
        passed = (index < requests) & (counted + tl.cumsum(units, 0) <= unit)
        request += tl.sum(passed.to(tl.int32))
        first_unit += tl.sum(tl.where(passed, units, 0))
        counted += tl.sum(units)
    if request >= requests:
        return
    start = tl.load(query_start + request)
    queries = tl.load(query_start + request + 1) - start
    if row_block * ROWS >= queries * GROUP:
        return
    length = tl.load(seq_lens + request)
    begin = length - _visible(seq_lens, query_start, request, requests, window) + (unit - first_unit) * tokens
    end = tl.minimum(begin + tokens, length)

    row = row_block * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    channel, real = _channels(HEAD_DIM, BITS, WIDTH)
    q_at = (start + token).to(tl.int64) * query_token_stride + head * query_head_stride
    q = tl.load(query + q_at[:, None] + channel, mask=(token < queries)[:, None] & real, other=0.0)
    position = length - queries + token
    page_of = cache + kv_head.to(tl.int64) * head_stride
    blocks = table + request * table_stride

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(begin, end, TILE):
        at = tile + tl.arange(0, TILE)
        here = at < end
        block = tl.load(blocks + at // BLOCK_SIZE, mask=here, other=0)
        page, slot = page_of + block.to(tl.int64) * block_stride, at % BLOCK_SIZE
        keys = _dequantize(page, slot, here, KEY, KEY_META, HEAD_DIM, BITS, GROUP_SIZE, META_BYTES, RUN, RUNS, q.dtype)
        scores = tl.dot(q, tl.trans(keys)) * scale
        if SOFT_CAP:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * scores / soft_cap) + 1.0))  # tanh
        age = position[:, None] - at[None, :]
        scores = tl.where((age >= 0) & (age < window) & here[None, :], scores * _LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Rows that have seen no token yet keep weights of 0, not NaN.
        origin = tl.maximum(new_top, -1e30)
        weights, shrink = tl.exp2(scores - origin[:, None]), tl.exp2(top - origin)
        values = _dequantize(
            page, slot, here, VALUE, VALUE_META, HEAD_DIM, BITS, GROUP_SIZE, META_BYTES, RUN, RUNS, q.dtype
        )
        weight = weight * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(q.dtype), values, sums * shrink[:, None])
        top = new_top

    slot_row = (unit * tl.num_programs(1) + pair).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(partial + slot_row[:, None] * WIDTH + tl.arange(0, WIDTH), sums)
    tl.store(stats + slot_row * 2, top)
    tl.store(stats + slot_row * 2 + 1, weight)


@triton.jit(do_not_specialize=["requests", "window", "budget"])
def _merge(
    out, partial, stats, seq_lens, query_start, out_token_stride, out_head_stride, requests, window, budget,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, ROW_BLOCKS: tl.constexpr, TILE: tl.constexpr, MIN: tl.constexpr,
):  # fmt: skip
    """Merge what the units of a request made of one of its query tokens and heads."""
    request, token, head = tl.program_id(0), tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    start = tl.load(query_start + request)
    visible = _visible(seq_lens, query_start, request, requests, window)
    if (token >= tl.load(query_start + request + 1) - start) | (visible <= 0):
        return
    tokens = _unit_tokens(seq_lens, query_start, requests, window, budget, TILE, MIN)
    first_unit = 0
    for first in range(0, request, _REQUESTS):
        index = first + tl.arange(0, _REQUESTS)
        first_unit += tl.sum(tl.cdiv(_visible(seq_lens, query_start, index, request, window), tokens))

    row = token * GROUP + head % GROUP
    pair = head // GROUP * ROW_BLOCKS + row // ROWS
    top, weight = float("-inf"), 0.0
    sums = tl.zeros((WIDTH,), tl.float32)
    units = tl.cdiv(visible, tokens)
    for first in range(0, units, _UNITS):
        unit = first + tl.arange(0, _UNITS)
        there = unit < units
        at = ((first_unit + unit) * (HEADS // GROUP * ROW_BLOCKS) + pair).to(tl.int64) * ROWS + row % ROWS
        tops = tl.load(stats + at * 2, mask=there, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(tops, 0))
        origin = tl.maximum(new_top, -1e30)
        factors, shrink = tl.exp2(tops - origin), tl.exp2(top - origin)
        rows = tl.load(partial + at[:, None] * WIDTH + tl.arange(0, WIDTH), mask=there[:, None], other=0.0)
        weight = weight * shrink + tl.sum(tl.load(stats + at * 2 + 1, mask=there, other=0.0) * factors, 0)
        sums = sums * shrink + tl.sum(rows * factors[:, None], 0)
        top = new_top
    channel, real = _channels(HEAD_DIM, BITS, WIDTH)
    out_at = (start + token).to(tl.int64) * out_token_stride + head * out_head_stride
    tl.store(out + out_at + channel, (sums / weight).to(out.dtype.element_ty), mask=real)


class GroupDecodeAttention:
    """Decode attention of one geometry, for any number of layers of one stream.

    Arguments are those of :class:`kv_cache.cuda.decode.DecodeAttention`, for a layout of a ``group`` format; in Triton's
    interpreter the device is the CPU.

    Args:
        programs: that a call should keep busy; None chooses by device.

    Raises:
        ParetoError: the device or the geometry is not served.

    """

    def __init__(
        self,
        layout: PageLayout,
        kv_heads: int,
        heads: int,
        dtype: torch.dtype,
        device: torch.device,
        max_requests: int,
        max_tokens: int,
        max_query_len: int = 1,
        soft_cap: bool = False,
        programs: int | None = None,
    ) -> None:
        fmt, dim = layout.fmt, layout.head_dim
        if fmt.static or fmt.key_bits != fmt.value_bits or fmt.key_bits not in (4, 8):
            raise ParetoError(f"{fmt.name}: the Triton decode kernel serves 4 or 8 bits with scales inside the page")
        self.geometry = Geometry(layout, kv_heads, heads, dtype, max_requests, max_tokens, max_query_len, soft_cap)
        if device.type == "cuda":
            device, _ = cuda_device(layout, device)
            properties = torch.cuda.get_device_properties(device)
            programs = programs or PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count
        elif not triton.knobs.runtime.interpret:
            raise ParetoError(f"{fmt.name}: the Triton decode kernel needs a CUDA device, not {device}")
        self.device, group, row_bytes = device, heads // kv_heads, dim * fmt.key_bits // 8
        run = math.gcd(row_bytes, fmt.group_size)  # divides groups and the halves that nibbles split channels into
        runs = triton.next_power_of_2(row_bytes // run)
        width = 8 // fmt.key_bits * runs * run
        # The accumulators of the largest block take half the registers of 8 warps.
        rows = min(max(triton.next_power_of_2(max_query_len * group), 16), 128, (1 << 14) // width)
        tile, row_blocks = 32 if width == 256 or rows == 128 else 64, -(-max_query_len * group // rows)
        self._pairs = kv_heads * row_blocks
        self._budget = -(-(programs or 1) // self._pairs)
        offsets = layout.offsets()
        both = {
            "HEAD_DIM": dim, "BITS": fmt.key_bits, "WIDTH": width, "GROUP": group, "ROWS": rows,
            "ROW_BLOCKS": row_blocks, "TILE": tile, "MIN": MIN_UNIT,
        }  # fmt: skip
        self._merge_options = {**both, "HEADS": heads, "num_warps": 4}
        self._attend_options = {
            **both, "GROUP_SIZE": fmt.group_size, "META_BYTES": GROUP_META_BYTES, "BLOCK_SIZE": layout.block_size,
            "KEY": offsets["key"], "VALUE": offsets["value"], "KEY_META": offsets["key_meta"],
            "VALUE_META": offsets["value_meta"], "RUN": run, "RUNS": runs, "SOFT_CAP": soft_cap,
            "num_warps": 8 if rows * width > 1 << 13 else 4,
        }  # fmt: skip
        slots = (max_requests + self._budget) * self._pairs * rows
        self._partial = torch.empty(slots, width, dtype=torch.float32, device=device)
        self._stats = torch.empty(slots, 2, dtype=torch.float32, device=device)

    def __call__(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> None:
        """Attend causally over codes, as :func:`kv_cache.reference.paged_attention`.

        Arguments are those of :meth:`kv_cache.cuda.decode.DecodeAttention.__call__`, less the scales. Rows of ``out``
        that belong to requests without tokens are left alone.

        Raises:
            ParetoError: shapes, strides or dtypes do not fit.

        """
        self.geometry.verify(query, out, cache, block_table, seq_lens, query_start, soft_cap, self.device)
        if not (requests := seq_lens.shape[0]) or not query.shape[0]:
            return
        batch = (requests, min(window or NO_WINDOW, NO_WINDOW), self._budget)
        with torch.cuda.device_of(query):  # Triton launches on the current device
            _attend[(requests + self._budget, self._pairs)](
                query, cache, block_table, seq_lens, query_start, self._partial, self._stats, query.stride(0),
                query.stride(1), cache.stride(0), cache.stride(1), block_table.stride(0), *batch, scale, soft_cap,
                **self._attend_options,
            )  # fmt: skip
            _merge[(requests, self.geometry.max_query_len * self.geometry.heads)](
                out, self._partial, self._stats, seq_lens, query_start, out.stride(0), out.stride(1), *batch,
                **self._merge_options,
            )  # fmt: skip
