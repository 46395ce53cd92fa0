"""The compiled CPU kernels: store new tokens into pages, and paged attention over codes.

The C sources are in ``csrc/``; their arithmetic is described in ``csrc/attention_impl.h``. Specification and oracle are
:mod:`kv_cache.codec` (codes, bit for bit) and :mod:`kv_cache.reference` (attention).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os

import torch

from kv_cache.errors import ParetoError
from kv_cache.layout import PageLayout
from kv_cache.scales import TENSORS, LayerScales

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISAS = ("generic", "avx2", "avx512", "amx")
ISA_VARIABLE = "VLLM_PARETO_CPU_ISA"
"""Environment variable that names an instruction set below the best one, for tests and for bug reports."""

_i32, _i64, _ptr, _f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Cache(ctypes.Structure):
    _fields_ = (
        ("base", _ptr),
        ("block_stride", _i64),
        ("head_stride", _i64),
        ("block_size", _i32),
        ("num_kv_heads", _i32),
        ("head_dim", _i32),
        ("key_bits", _i32),
        ("value_bits", _i32),
        ("group_size", _i32),
        ("key_offset", _i32),
        ("key_high_offset", _i32),
        ("value_offset", _i32),
        ("value_high_offset", _i32),
        ("key_meta_offset", _i32),
        ("value_meta_offset", _i32),
        *((name, _ptr) for name in TENSORS),
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
        ("key_inverse", _ptr),
        ("value_inverse", _ptr),
        ("slots", _ptr),
        ("num_tokens", _i64),
        ("dtype", _i32),
        ("num_threads", _i32),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("kv_cache._cpu")
    if spec is None or spec.origin is None:
        raise ParetoError(
            "the CPU kernels of vllm-pareto are not compiled: install a C compiler and run 'pip install' again"
        )
    # The library leaves its OpenMP calls open. PyTorch's runtime answers them, so that one pool of threads, with the
    # pinning that vLLM gave it, runs both.
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(spec.origin)
    library.pareto_attention.argtypes = [ctypes.POINTER(_Attention), ctypes.c_int]
    library.pareto_store.argtypes = [ctypes.POINTER(_Store)]
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


class PagedCache:
    """One layer's pages with the format and scales that read them; holds what the kernels need between calls.

    Args:
        cache: uint8 [blocks, KV heads, block_size, bytes per token] on CPU. Blocks and heads may have any stride
            (padded and hybrid pages exist); the bytes of one block and head are contiguous.
        layout: of a page; its block size is the cache's.
        scales: the layer's scales, float32 [KV heads, head_dim] each; None for a ``group`` format.

    Raises:
        ParetoError: the shape or strides do not fit the layout, or scales are missing.

    """

    def __init__(self, cache: torch.Tensor, layout: PageLayout, scales: LayerScales | None) -> None:
        _, heads, tokens, width = cache.shape
        if cache.dtype != torch.uint8 or (tokens, width) != (layout.block_size, layout.bytes_per_token):
            raise ParetoError(
                f"{layout.fmt.name}: expected uint8 pages of {layout.block_size} tokens of {layout.bytes_per_token} "
                f"bytes, got {cache.dtype} {tuple(cache.shape)}"
            )
        if cache.stride(3) != 1 or cache.stride(2) != width:
            raise ParetoError(f"{layout.fmt.name}: the bytes of one block and head must be contiguous")
        if layout.fmt.static and scales is None:
            raise ParetoError(f"{layout.fmt.name} needs calibrated scales")
        self.cache, self.layout = cache, layout
        storage = cache.untyped_storage()
        _library().pareto_prefer_huge_pages(storage.data_ptr(), storage.nbytes())
        self._scales = (
            [getattr(scales, name).float().contiguous() for name in TENSORS]
            if layout.fmt.static and scales is not None
            else []
        )
        if any(tuple(t.shape) != (heads, layout.head_dim) for t in self._scales):
            raise ParetoError(f"{layout.fmt.name}: scales must have shape {(heads, layout.head_dim)}")
        self._inverses = [
            1.0 / self._scales[TENSORS.index(f"{kind}_scale")] for kind in ("key", "value") if self._scales
        ]
        offsets = layout.offsets()
        self._struct = _Cache(
            cache.data_ptr(),
            cache.stride(0),
            cache.stride(1),
            layout.block_size,
            heads,
            layout.head_dim,
            layout.fmt.key_bits,
            layout.fmt.value_bits,
            layout.fmt.group_size,
            *(offsets[k] for k in ("key", "key_high", "value", "value_high", "key_meta", "value_meta")),
            *([t.data_ptr() for t in self._scales] or [None] * len(TENSORS)),
        )

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantize tokens and write them into their slots, bit for bit as :func:`kv_cache.codec.write_pages`.

        Args:
            key: [tokens, KV heads, head_dim] float32, bfloat16 or float16, channels contiguous.
            value: likewise.
            slots: int64 [at most tokens], ``block * block_size + offset``; negative ones are skipped. Tokens beyond
                its length are padding.

        """
        args = _Store(
            self._struct,
            key.data_ptr(),
            value.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            *([t.data_ptr() for t in self._inverses] or [None, None]),
            slots.data_ptr(),
            min(slots.shape[0], key.shape[0]),
            DTYPES[key.dtype],
            torch.get_num_threads(),
        )
        _library().pareto_store(ctypes.byref(args))

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

        Raises:
            ParetoError: the instruction set is not there.
            MemoryError: no memory for scratch.

        """
        args = _Attention(
            self._struct,
            query.data_ptr(),
            out.data_ptr(),
            query.stride(0),
            query.stride(1),
            out.stride(0),
            out.stride(1),
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
        status = _library().pareto_attention(ctypes.byref(args), ISAS.index(isa or _default_isa()))
        if status == -1:
            raise MemoryError("no memory for the attention kernel's scratch")
        if status:
            raise ParetoError(f"instruction set {isa!r} is not available on this processor")
