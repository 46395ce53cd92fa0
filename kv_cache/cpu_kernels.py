"""The compiled CPU kernels: store new tokens into pages, and paged attention over codes.

The C sources are in ``csrc/``; their arithmetic is described in ``csrc/attention_impl.h``. Specification and oracle are
:mod:`kv_cache.codec` (codes, bit for bit) and :mod:`kv_cache.reference` (attention).
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from kv_cache import codec
from kv_cache.compiled import compiled_library
from kv_cache.doors import are_heads, are_sinks, expect, is_table, is_vector
from kv_cache.errors import ParetoError
from kv_cache.formats import PLANES
from kv_cache.layout import META, PageLayout
from kv_cache.rotary import SPAN, CentreTable
from kv_cache.scales import LayerScales

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISAS = ("generic", "avx2", "avx512", "amx")
ISA_VARIABLE = "VLLM_PARETO_CPU_ISA"
"""Environment variable that names an instruction set below the best one, for tests and for bug reports."""

KINDS = ("key", "value")
SCALES = ("key_first", "key_transform", "key_inverse", "value_encode", "value_decode", "value_mirror")
READ_SCALES = ("key_inverse", "key_first", "value_decode", "value_mirror", "key_mean")
TURN_TABLES = ("pair_channels", "turn_fine", "turn_anchors", "turn_tiles")
PAIRS = 32
"""Pairs of channels that one tile of the table of centres holds."""

_i32, _i64, _ptr, _f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Cache(ctypes.Structure):
    _fields_ = (
        ("base", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("block_size", _i32),
        ("num_kv_heads", _i32),
        ("head_dim", _i32),
        ("planes", _i32 * 8),
        ("meta_offset", _i32),
        ("pairs", _i32),
        ("num_anchors", _i32),
        *((name, _ptr) for name in (*READ_SCALES, *TURN_TABLES)),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("cache", _Cache),
        ("query", _ptr),
        ("out", _ptr),
        ("query_token_stride", _i64),
        ("query_head_stride", _i64),
        ("out_token_stride", _i64),
        ("out_head_stride", _i64),
        ("key", _ptr),
        ("value", _ptr),
        ("key_token_stride", _i64),
        ("key_head_stride", _i64),
        ("value_token_stride", _i64),
        ("value_head_stride", _i64),
        ("sinks", _ptr),
        ("block_table", _ptr),
        ("table_stride", _i64),
        ("seq_lens", _ptr),
        ("query_start", _ptr),
        ("num_reqs", _i32),
        ("num_heads", _i32),
        ("dtype", _i32),
        ("window", _i32),
        ("num_threads", _i32),
        ("scale", _f32),
        ("soft_cap", _f32),
    )


class _Store(ctypes.Structure):
    _fields_ = (
        ("cache", _Cache),
        ("key", _ptr),
        ("value", _ptr),
        ("key_token_stride", _i64),
        ("key_head_stride", _i64),
        ("value_token_stride", _i64),
        ("value_head_stride", _i64),
        ("key_transform", _ptr),
        ("value_encode", _ptr),
        ("range_factor", _f32 * 2),
        ("zero_factor", _f32 * 2),
        ("gain", _f32 * 2),
        ("slots", _ptr),
        ("positions", _ptr),
        ("num_tokens", _i64),
        ("dtype", _i32),
        ("num_threads", _i32),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = compiled_library("kv_cache._cpu", attention=_Attention, store=_Store)
    if library is None:
        raise ParetoError(
            "the CPU kernels of vllm-pareto are not compiled: install a C compiler and run 'pip install' again"
        )
    library.pareto_attention.argtypes = [ctypes.POINTER(_Attention), ctypes.c_int]
    library.pareto_store.argtypes = [ctypes.POINTER(_Store), ctypes.c_int]
    library.pareto_prefer_huge_pages.argtypes = [_ptr, _i64]
    return library


def best_isa() -> str:
    """Return the widest instruction set of this processor that the kernels were compiled for.

    Raises:
        ParetoError: the kernels are not compiled.

    """
    return ISAS[_library().pareto_best_isa()]


def _default_isa() -> str:
    name = os.environ.get(ISA_VARIABLE, "") or best_isa()
    if name not in ISAS[: ISAS.index(best_isa()) + 1]:
        raise ParetoError(f"{ISA_VARIABLE}={name}: this processor has {', '.join(ISAS[: ISAS.index(best_isa()) + 1])}")
    return name


def _pad_pairs(x: torch.Tensor) -> torch.Tensor:
    """Widen the last dimension to a multiple of PAIRS, with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % PAIRS)).contiguous()


@functools.lru_cache(maxsize=8)
def _turn_tables(table: CentreTable) -> dict[str, torch.Tensor]:
    """Return a table of centres in the kernels' order (csrc/pareto_cpu.h); one for all layers of a model."""
    codes = torch.stack([_pad_pairs(table.cos_codes), _pad_pairs(table.sin_codes)], 1)  # [SPAN, 2, pairs]
    # Tile row i of 16 positions: for each position the cosines of pairs i and 16 + i and then their sines.
    tiles = codes.view(SPAN // 16, 16, 2, -1, 2, 16).permute(3, 0, 5, 1, 2, 4)
    return {
        "pair_channels": torch.stack([_pad_pairs(channels) for channels in table.rotary.channels()]).int(),
        "turn_fine": CentreTable.read(codes),
        "turn_anchors": torch.stack([_pad_pairs(table.anchor_cos), _pad_pairs(table.anchor_sin)], 1),
        "turn_tiles": tiles.contiguous(),
    }


def _planes(layout: PageLayout) -> list[int]:
    """Return offset and width of the two planes of keys and of values; of a plane that is not there, zeros."""
    result = []
    for kind in KINDS:
        planes = [(layout.offsets[f"{kind}.{i}"], width) for i, width in enumerate(PLANES[layout.fmt.bits(kind)])]
        result += [*planes, (0, 0)][:2]
    return [number for plane in result for number in plane]


class PagedCache:
    """One layer's pages with the format and scales that read them; holds what the kernels need between calls.

    Args:
        cache: uint8 [blocks, KV heads, block_size, bytes per token] on CPU. Blocks and heads may have any stride
            (padded and hybrid pages exist); the bytes of one block and head are contiguous.
        layout: of a page; its block size is the cache's.
        scales: the layer's scales.
        max_tokens: of the longest sequence; None means what the scales' rotary embedding says.

    Attributes:
        max_tokens: positions that the pages serve, ``max_tokens`` rounded up to a multiple of SPAN.

    Raises:
        ParetoError: the shape or strides do not fit the layout, or the scales do not fit the cache.

    """

    def __init__(
        self, cache: torch.Tensor, layout: PageLayout, scales: LayerScales, max_tokens: int | None = None
    ) -> None:
        _, heads, tokens, width = cache.shape
        name, dim = layout.fmt.name, layout.head_dim
        if cache.dtype != torch.uint8 or (tokens, width) != (layout.block_size, layout.bytes_per_token):
            raise ParetoError(
                f"{name}: expected uint8 pages of {layout.block_size} tokens of {layout.bytes_per_token} "
                f"bytes, got {cache.dtype} {tuple(cache.shape)}"
            )
        if cache.stride(3) != 1 or cache.stride(2) != width:
            raise ParetoError(f"{name}: the bytes of one block and head must be contiguous")
        if tuple(scales.key_mean.shape) != (heads, dim):
            raise ParetoError(
                f"{name}: scales are for (heads, channels) {tuple(scales.key_mean.shape)}, not for {(heads, dim)}"
            )
        self.cache, self.layout = cache, layout
        storage = cache.untyped_storage()
        _library().pareto_prefer_huge_pages(storage.data_ptr(), storage.nbytes())
        table = scales.rotary.table(max_tokens or scales.rotary.max_position)
        self.max_tokens = SPAN * len(table.anchor_cos)
        self._tensors = {
            "key_mean": torch.stack([_pad_pairs(scales.key_mean[:, part]) for part in scales.rotary.channels()], 1),
            **{name: getattr(scales, name).float().contiguous() for name in SCALES},
            **_turn_tables(table),
        }
        self._struct = _Cache(
            cache.data_ptr(),
            cache.stride(0),
            cache.stride(1),
            layout.block_size,
            heads,
            dim,
            (_i32 * 8)(*_planes(layout)),
            layout.offsets[META],
            self._tensors["key_mean"].shape[-1],
            len(table.anchor_cos),
            *map(self._address, (*READ_SCALES, *TURN_TABLES)),
        )
        factors = zip(*(codec.factors(layout.fmt.bits(kind)) for kind in KINDS), strict=True)
        self._factors = [(_f32 * 2)(*sides) for sides in factors]

    def _address(self, name: str) -> int:
        return self._tensors[name].data_ptr()

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        isa: str | None = None,
    ) -> None:
        """Quantize tokens and write them into their slots, bit for bit as :func:`kv_cache.codec.write_pages`.

        Args:
            key: [tokens, KV heads, head_dim] float32, bfloat16 or float16, channels contiguous.
            value: likewise.
            slots: int64 [at most tokens], ``block * block_size + offset``; negative ones are skipped. Tokens beyond
                its length are padding.
            positions: int64, as many as slots: of each token in its sequence.
            isa: one of ISAS; None takes the best, or what VLLM_PARETO_CPU_ISA names.

        Raises:
            ParetoError: the instruction set is not there, a position is missing or beyond ``max_tokens``, or shapes,
                strides or dtypes do not fit.

        """
        heads, dim = self.cache.shape[1], self.layout.head_dim
        expect(
            f"{self.layout.fmt.name} store",
            (
                (key.dtype in DTYPES and key.dtype == value.dtype, "keys and values alike, of 16 or 32 bits"),
                (are_heads(key, heads, dim), f"keys [tokens, {heads}, {dim}] with contiguous channels"),
                (are_heads(value, heads, dim), f"values [tokens, {heads}, {dim}] with contiguous channels"),
                (key.shape[0] == value.shape[0], "as many values as keys"),
                (is_vector(slots, torch.int64), "contiguous int64 slots"),
                (is_vector(positions, torch.int64), "contiguous int64 positions"),
                (all(t.is_cpu for t in (key, value, slots, positions)), "tensors on the CPU"),
            ),
        )
        count = min(slots.shape[0], key.shape[0])
        if positions.shape[0] < count:
            raise ParetoError(f"{self.layout.fmt.name}: positions of {positions.shape[0]} tokens for {count} tokens")
        args = _Store(
            self._struct,
            key.data_ptr(),
            value.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            self._address("key_transform"),
            self._address("value_encode"),
            *self._factors,
            slots.data_ptr(),
            positions.data_ptr(),
            count,
            DTYPES[key.dtype],
            torch.get_num_threads(),
        )
        self._check(_library().pareto_store(ctypes.byref(args), ISAS.index(isa or _default_isa())), isa)

    def _check(self, status: int, isa: str | None) -> None:
        if status == -1:
            raise MemoryError("no memory for the attention kernel's scratch")
        if status == -3:
            raise ParetoError(
                f"{self.layout.fmt.name}: a token lies beyond the {self.max_tokens} positions that its pages serve"
            )
        if status:
            raise ParetoError(f"instruction set {isa!r} is not available on this processor")

    def attend(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
        isa: str | None = None,
        own: tuple[torch.Tensor, torch.Tensor] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attend causally over codes, as :func:`kv_cache.reference.paged_attention`.

        Args:
            query: [tokens, heads, head_dim] float32, bfloat16 or float16, channels contiguous; a request's tokens are
                the last of its sequence, and their codes are in the pages already.
            out: like query; written.
            block_table: int32 [requests, blocks], rows contiguous.
            seq_lens: int32 [requests], the query's tokens included.
            query_start: int32 [requests + 1].
            scale: factor of q.k.
            window: a token sees the last ``window`` tokens, itself included; 0 means all.
            soft_cap: c in ``c * tanh(score / c)``; 0 means none.
            isa: one of ISAS; None takes the best, or what VLLM_PARETO_CPU_ISA names.
            own: keys and values of the query's tokens, [tokens, KV heads, head_dim] of its dtype, channels contiguous;
                None: they are read from codes like all others.
            sinks: float32 [heads], contiguous: a logit of each head that joins the sum in the softmax and brings no
                value; None: there is none.

        Raises:
            ParetoError: the instruction set is not there, a sequence is longer than ``max_tokens``, or shapes, strides
                or dtypes do not fit.
            MemoryError: no memory for scratch.

        """
        heads, dim, requests = self.cache.shape[1], self.layout.head_dim, seq_lens.shape[0]
        of_query = query.shape[1] if query.dim() == 3 else 0
        expect(
            f"{self.layout.fmt.name} attention",
            (
                (query.dtype in DTYPES and query.dtype == out.dtype, "queries and outputs alike, of 16 or 32 bits"),
                (of_query > 0 and of_query % heads == 0, f"[tokens, heads, {dim}], heads in multiples of {heads}"),
                (are_heads(query, of_query, dim), f"queries [tokens, heads, {dim}] with contiguous channels"),
                (are_heads(out, of_query, dim), f"outputs [tokens, heads, {dim}] with contiguous channels"),
                (query.shape[0] == out.shape[0], "as many outputs as queries"),
                (is_table(block_table, torch.int32), "an int32 block table with contiguous rows"),
                (is_vector(seq_lens, torch.int32), "contiguous int32 lengths"),
                (is_vector(query_start, torch.int32), "contiguous int32 starts of queries"),
                (block_table.shape[0] >= requests < query_start.shape[0], "a row and a start for each request"),
                (all(t.is_cpu for t in (query, out, block_table, seq_lens, query_start)), "tensors on the CPU"),
                *(
                    (
                        _of_tokens(x, query, heads),
                        f"own keys and values like queries, [tokens, {heads}, {dim}] with contiguous channels",
                    )
                    for x in own or ()
                ),
                (sinks is None or are_sinks(sinks, of_query, query.device), f"contiguous float32 sinks [{of_query}]"),
            ),
        )
        key, value = own or (None, None)
        args = _Attention(
            self._struct,
            query.data_ptr(),
            out.data_ptr(),
            query.stride(0),
            query.stride(1),
            out.stride(0),
            out.stride(1),
            *(None if x is None else x.data_ptr() for x in (key, value)),
            *(0 if x is None else x.stride(axis) for x in (key, value) for axis in (0, 1)),
            None if sinks is None else sinks.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            seq_lens.data_ptr(),
            query_start.data_ptr(),
            seq_lens.shape[0],
            query.shape[1],
            DTYPES[query.dtype],
            window,
            torch.get_num_threads(),
            scale,
            soft_cap,
        )
        self._check(_library().pareto_attention(ctypes.byref(args), ISAS.index(isa or _default_isa())), isa)


def _of_tokens(x: torch.Tensor, query: torch.Tensor, heads: int) -> bool:
    """Return whether x [tokens, heads, head_dim] are keys or values of a query's tokens."""
    alike = x.dtype == query.dtype and x.shape[0] == query.shape[0] and x.is_cpu
    return alike and are_heads(x, heads, query.shape[2])
