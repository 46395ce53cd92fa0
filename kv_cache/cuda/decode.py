"""Paged decode attention over codes on a CUDA device: the host's side of ``csrc/prepare.cu`` and ``csrc/decode.cu``.

Specification and oracle is :func:`kv_cache.reference.paged_attention`. Two launches make up a call: the first folds the
keys' transform and centre into the queries, the second attends. Neither needs anything from the host but shapes, so a
call can be captured in a CUDA graph and replayed with other lengths and block tables.
"""

from __future__ import annotations

import ctypes

import torch

from kv_cache.cuda import tuning as tunings
from kv_cache.cuda.arguments import Geometry, cuda_device
from kv_cache.cuda.constants import aligned
from kv_cache.cuda.folding import Folding
from kv_cache.cuda.launch import load_kernel
from kv_cache.cuda.tuning import ROW_TILE, Tuning
from kv_cache.doors import expect, is_vector
from kv_cache.errors import ParetoError
from kv_cache.layout import PageLayout

PREPARE_PARTS = 4
"""Threads of ``csrc/prepare.cu`` that share a channel."""

_i32, _i64, _ptr, _f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _PrepareParams(ctypes.Structure):
    _fields_ = (
        ("query", _ptr),
        ("query_token_stride", _i64),
        ("query_head_stride", _i64),
        ("key", _ptr),
        ("key_token_stride", _i64),
        ("key_head_stride", _i64),
        ("inverse", _ptr),
        ("mean", _ptr),
        ("first", _ptr),
        ("prepared", _ptr),
        ("rows", _ptr),
        ("bias_rows", _ptr),
        ("rotated", _i32),
        ("interleaved", _i32),
        ("query_rows", _i32),
        ("kv_heads", _i32),
        ("group", _i32),
        ("scale", _f32),
        ("beside_store", _i32),
    )


class _DecodeParams(ctypes.Structure):
    _fields_ = (
        ("cache", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("query", _ptr),
        ("rows", _ptr),
        ("out", _ptr),
        ("out_token_stride", _i64),
        ("out_head_stride", _i64),
        ("block_table", _ptr),
        ("table_stride", _i64),
        ("seq_lens", _ptr),
        ("query_start", _ptr),
        ("value", _ptr),
        ("value_token_stride", _i64),
        ("value_head_stride", _i64),
        ("sinks", _ptr),
        ("value_output", _ptr),
        ("partial", _ptr),
        ("partial_stats", _ptr),
        ("counters", _ptr),
        ("bias_rows", _ptr),
        ("bias_turns", _ptr),
        ("bias_table", _ptr),
        ("awaits_store", _ptr),
        ("requests", _i32),
        ("kv_heads", _i32),
        ("group", _i32),
        ("row_blocks", _i32),
        ("window", _i32),
        ("soft_cap", _f32),
    )


class DecodeAttention:
    """Decode attention of one geometry, for any number of layers of one stream.

    Args:
        layout: of a page.
        kv_heads: of a layer.
        heads: query heads of a layer; a multiple of ``kv_heads``.
        dtype: of queries and outputs, float16 or bfloat16.
        device: CUDA device of compute capability 8.0 or above.
        max_requests: most requests of a call.
        max_tokens: most query tokens of a call.
        max_query_len: most query tokens of a request, 1 to 16.
        soft_cap: whether calls have a soft cap.
        tuning: None chooses by device and format.

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
        tuning: Tuning | None = None,
    ) -> None:
        geometry = Geometry(layout, kv_heads, heads, dtype, max_requests, max_tokens, max_query_len, soft_cap)
        device, capability = cuda_device(layout, device)
        self.geometry, self.layout, self.kv_heads, self.device = geometry, layout, kv_heads, device
        self.group = heads // kv_heads
        rows = max_query_len * self.group
        properties = torch.cuda.get_device_properties(device)
        self.tuning = tuning or tunings.choose(layout, rows, capability, properties.shared_memory_per_block_optin)
        self._row_blocks = -(-rows // self.tuning.rows)
        self._overlap = capability >= (9, 0)

        fmt, bf16 = layout.fmt, int(dtype == torch.bfloat16)
        steps = tunings.query_steps(layout)
        page = (("HEAD_DIM", layout.head_dim), ("KEY_BITS", fmt.key_bits), ("VALUE_BITS", fmt.value_bits))
        macros = (
            *page,
            ("BLOCK_SIZE", layout.block_size),
            ("SOFT_CAP", int(soft_cap)),
            ("OUT_BFLOAT", bf16),
            ("PARAMS_BYTES", ctypes.sizeof(_DecodeParams)),
            *self.tuning.macros(),
        )
        self._decode = load_kernel("decode.cu", "decode", macros, device, self.tuning.shared_bytes(layout))
        folds = (*page, ("IN_BFLOAT", bf16), ("BULK_COPY", 0), ("PARAMS_BYTES", ctypes.sizeof(_PrepareParams)))
        self._prepare = load_kernel("prepare.cu", "prepare", folds, device)
        resident = self._decode.blocks_per_multiprocessor(32 * self.tuning.warps)
        if not resident:
            raise ParetoError(f"{layout.fmt.name}: {self.tuning} does not fit this device")
        self.blocks = resident * properties.multi_processor_count

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._value: torch.Tensor | None = None
        self._awaits_store: torch.Tensor | None = None
        self._always = torch.ones(1, dtype=torch.int32, device=device)
        self._prepared = empty(max_tokens, heads, 16 * steps, dtype=torch.float16)
        self._rows = empty(max_tokens, heads, 4)
        self._bias_rows = empty(max_tokens, heads, layout.head_dim)
        self._partial = empty(2 * self.blocks, self.tuning.rows, layout.head_dim)
        self._partial_stats = empty(2 * self.blocks, self.tuning.rows, 2)
        # The kernel leaves its counters at zero.
        self._counters = torch.zeros(max_requests * self._row_blocks * kv_heads, dtype=torch.int32, device=device)

    def prepare(
        self,
        query: torch.Tensor,
        folding: Folding,
        scale: float,
        beside_store: bool = False,
        own: tuple[torch.Tensor, torch.Tensor] | None = None,
        awaits_store: torch.Tensor | None = None,
    ) -> None:
        """Fold the keys' transform and centre into the queries.

        Args:
            query: [tokens, heads, head_dim], channels contiguous.
            folding: the layer's.
            scale: factor of q.k.
            beside_store: the launch just before this one is :func:`kv_cache.cuda.store.store`, and it said that the
                next launch may run beside it.
            own: keys and values of the query's tokens, [tokens, KV heads, head_dim] of its dtype, which :meth:`attend`
                then takes as they are; None: it reads them from codes like all others.
            awaits_store: int32 [1], read beside a store only, when the kernels run. 0: what that store writes is
                read by no query but those of the same request, so :meth:`attend` may read all other pages before the
                store is over. Otherwise it waits. None: it waits.

        Raises:
            ParetoError: shapes, strides or dtypes do not fit.

        """
        self.geometry.verify_queries(query, own, self.device)
        if awaits_store is not None:
            right = is_vector(awaits_store, torch.int32) and awaits_store.device == self.device
            expect(f"{self.layout.fmt.name} decode attention", ((right, f"int32 awaits_store on {self.device}"),))
        waits = self._always if awaits_store is None else awaits_store
        self._awaits_store = waits if beside_store else None
        key, self._value = (None, None) if own is None else (own[0], aligned(own[1], 8))
        tokens = query.shape[0]
        params = _PrepareParams(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            *_place(key),
            folding.key_inverse.data_ptr(),
            folding.key_mean.data_ptr(),
            folding.key_first.data_ptr(),
            self._prepared.data_ptr(),
            self._rows.data_ptr(),
            self._bias_rows.data_ptr(),
            folding.positions.rotated,
            int(folding.positions.interleaved),
            tokens * self.group,
            self.kv_heads,
            self.group,
            scale,
            int(beside_store),
        )
        threads = -(-self.layout.head_dim // 32) * 32 * PREPARE_PARTS
        grid = (-(-tokens * self.group // ROW_TILE), self.kv_heads, 1)
        self._prepare.launch(grid, threads, params, self.device, self._overlap)

    def attend(
        self,
        out: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        folding: Folding,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attend with the queries that :meth:`prepare` left.

        Args:
            out: [tokens, heads, head_dim], channels contiguous; rows of requests without tokens are left alone.
            cache: uint8 [blocks, KV heads, block_size, bytes per token], of any block and head stride that is a
                multiple of 16 bytes.
            block_table: int32 [requests, blocks], rows contiguous.
            seq_lens: int32 [requests], the query's tokens included; 0 for padding.
            query_start: int32 [requests + 1].
            folding: the layer's; its positions reach as far as the longest sequence.
            window: a token sees the last ``window`` tokens, itself included; 0 means all.
            soft_cap: c in ``c * tanh(score / c)``; 0 means none.
            sinks: float32 [heads], contiguous: a logit of each head that joins the sum in the softmax and brings no
                value; None: there is none.

        Raises:
            ParetoError: shapes, strides or dtypes do not fit.

        """
        self.geometry.verify_pages(out, cache, block_table, seq_lens, query_start, soft_cap, sinks, self.device)
        params = _DecodeParams(
            cache.data_ptr(),
            cache.stride(0),
            cache.stride(1),
            self._prepared.data_ptr(),
            self._rows.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            out.stride(1),
            block_table.data_ptr(),
            block_table.stride(0),
            seq_lens.data_ptr(),
            query_start.data_ptr(),
            *_place(self._value),
            None if sinks is None else sinks.data_ptr(),
            folding.value_output.data_ptr(),
            self._partial.data_ptr(),
            self._partial_stats.data_ptr(),
            self._counters.data_ptr(),
            self._bias_rows.data_ptr(),
            folding.positions.far.data_ptr(),
            folding.positions.operands.data_ptr(),
            None if self._awaits_store is None else self._awaits_store.data_ptr(),
            seq_lens.shape[0],
            self.kv_heads,
            self.group,
            self._row_blocks,
            window,
            soft_cap,
        )
        self._decode.launch((self.blocks, 1, 1), 32 * self.tuning.warps, params, self.device, self._overlap)

    def __call__(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        folding: Folding,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
        own: tuple[torch.Tensor, torch.Tensor] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attend causally over codes, as :func:`kv_cache.reference.paged_attention`.

        Args:
            query: [tokens, heads, head_dim], channels contiguous; a request's tokens are the last of its sequence, and
                their codes are in the pages already.
            out: like query; written.
            cache: see :meth:`attend`, like the rest.
            block_table: blocks of each request.
            seq_lens: tokens of each request.
            query_start: first query token of each request.
            folding: the layer's scales.
            scale: factor of q.k.
            window: tokens seen, 0 for all.
            soft_cap: 0 for none.
            own: see :meth:`prepare`.
            sinks: see :meth:`attend`.

        Raises:
            ParetoError: shapes, strides or dtypes do not fit.

        """
        if query.shape != out.shape:
            raise ParetoError(f"{self.layout.fmt.name} decode attention expects as many outputs as queries")
        self._verify(folding)
        self.prepare(query, folding, scale, own=own)
        self.attend(out, cache, block_table, seq_lens, query_start, folding, window, soft_cap, sinks)

    def _verify(self, folding: Folding) -> None:
        heads, dim = self.kv_heads, self.layout.head_dim
        folded = (folding.key_inverse, folding.key_mean, folding.key_first, folding.value_output)
        shapes = [(heads, dim, dim), (heads, dim), (heads, dim), (heads, dim + 4)]
        for valid, what in (
            (all(t.dtype == torch.float32 and t.is_contiguous() for t in folded), "float32 contiguous scales"),
            ([tuple(t.shape) for t in folded] == shapes, f"scales of {heads} KV heads of {dim}"),
            (all(t.device == self.device for t in folded), f"scales on {self.device}"),
            (folding.positions.far.shape[1] == dim, f"positions of heads of {dim}"),
        ):
            if not valid:
                raise ParetoError(f"{self.layout.fmt.name} decode attention expects {what}")


def _place(x: torch.Tensor | None) -> tuple[int | None, int, int]:
    """Return where a tensor of heads lies, and its strides of tokens and heads."""
    return (None, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))
