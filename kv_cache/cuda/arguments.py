"""What every decode-attention kernel asks of its geometry and of a call's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kv_cache.doors import are_sinks, expect, in_line
from kv_cache.errors import ParetoError
from kv_cache.layout import PageLayout

DTYPES = (torch.float16, torch.bfloat16)
MAX_QUERY_LEN = 16
MIN_CAPABILITY = (8, 0)


def cuda_device(layout: PageLayout, device: torch.device) -> tuple[torch.device, tuple[int, int]]:
    """Return the device with its index, and its compute capability.

    Raises:
        ParetoError: the device is too old.

    """
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ParetoError(f"{layout.fmt.name} needs compute capability 8.0 or above, not {capability}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index), capability


@dataclass(frozen=True)
class Geometry:
    """What a :class:`kv_cache.cuda.decode.DecodeAttention` was made for; its arguments say what the attributes are.

    Raises:
        ParetoError: no kernel serves it.

    """

    layout: PageLayout
    kv_heads: int
    heads: int
    dtype: torch.dtype
    max_requests: int
    max_tokens: int
    max_query_len: int
    soft_cap: bool

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.heads % self.kv_heads or not 1 <= self.max_query_len <= MAX_QUERY_LEN:
            raise ParetoError(
                f"{self.layout.fmt.name}: the CUDA decode kernel serves float16 and bfloat16, whole groups of query "
                f"heads, and 1 to {MAX_QUERY_LEN} query tokens a request; got {self.dtype}, {self.heads} heads over "
                f"{self.kv_heads}, {self.max_query_len}"
            )

    def verify_queries(
        self, query: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor] | None, device: torch.device
    ) -> None:
        """Check the arguments of :meth:`kv_cache.cuda.decode.DecodeAttention.prepare`.

        Raises:
            ParetoError: shapes, strides, dtypes or devices do not fit.

        """
        dim = self.layout.head_dim
        self._expect(
            [
                (query.dtype == self.dtype, f"queries and outputs of {self.dtype}"),
                (
                    tuple(query.shape[1:]) == (self.heads, dim),
                    f"{self.heads} heads of {dim}",
                ),
                (in_line(query), "contiguous channels"),
                (query.shape[0] <= self.max_tokens, f"at most {self.max_tokens} query tokens"),
                (query.device == device, f"tensors on {device}"),
                *(
                    (
                        tuple(x.shape) == (len(query), self.kv_heads, dim)
                        and x.dtype == self.dtype
                        and x.stride(2) == 1
                        and x.device == device,
                        f"own keys and values like queries, {self.kv_heads} heads of {dim}",
                    )
                    for x in own or ()
                ),
            ]
        )

    def verify_pages(
        self,
        out: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        soft_cap: float,
        sinks: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        """Check the arguments of :meth:`kv_cache.cuda.decode.DecodeAttention.attend`; see :meth:`verify_queries`."""
        layout, dim = self.layout, self.layout.head_dim
        page = (self.kv_heads, layout.block_size, layout.bytes_per_token)
        aligned = cache.stride(0) % 16 == cache.stride(1) % 16 == cache.data_ptr() % 16 == 0
        aligned_out = out.stride(0) % 4 == out.stride(1) % 4 == out.data_ptr() % 8 == 0
        indices, requests = (block_table, seq_lens, query_start), seq_lens.shape[0]
        self._expect(
            [
                (cache.dtype == torch.uint8 and tuple(cache.shape[1:]) == page, f"uint8 pages {page}"),
                (cache.stride()[2:] == (layout.bytes_per_token, 1), "contiguous pages of a head"),
                (aligned, "pages at multiples of 16 bytes"),
                (out.dtype == self.dtype, f"queries and outputs of {self.dtype}"),
                (tuple(out.shape[1:]) == (self.heads, dim), f"{self.heads} heads of {dim}"),
                (in_line(out), "contiguous channels"),
                (aligned_out, "output rows at multiples of 8 bytes"),
                (out.shape[0] <= self.max_tokens, f"at most {self.max_tokens} query tokens"),
                (requests <= self.max_requests, f"at most {self.max_requests} requests"),
                (requests == query_start.shape[0] - 1 == block_table.shape[0], "as many rows as requests"),
                (all(t.dtype == torch.int32 and in_line(t) for t in indices), "dense int32 indices"),
                (bool(soft_cap) == self.soft_cap, "a soft cap exactly if the kernel was made for one"),
                (sinks is None or are_sinks(sinks, self.heads, device), f"contiguous float32 sinks [{self.heads}]"),
                (all(t.device == device for t in (out, cache, *indices)), f"tensors on {device}"),
            ]
        )

    def _expect(self, conditions: list[tuple[bool, str]]) -> None:
        expect(f"{self.layout.fmt.name} decode attention", conditions)
