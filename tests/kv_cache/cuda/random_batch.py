"""Random pages, scales and requests, and attention over them in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from kv_cache import codec
from kv_cache.cuda.decode import DecodeAttention
from kv_cache.cuda.folding import Folding
from kv_cache.formats import FORMATS, HEAD_SIZES, KVFormat, layer_format
from kv_cache.layout import META, PageLayout
from kv_cache.scales import LayerScales
from tests.kv_cache.empty_pages import scattered_table, slots_of
from tests.kv_cache.random_scales import random_scales

MIXED = {"k8v2": (8, 2), "k3v6": (3, 6), "k2v4": (2, 4), "k6v8": (6, 8)}
"""Layers of ``mixed_per_head``, such that each number of bits is once the keys' and once the values'."""


def format_of(name: str) -> KVFormat:
    return layer_format(*MIXED[name]) if name in MIXED else FORMATS[name]


def served(names: tuple[str, ...], dims: tuple[int, ...] = HEAD_SIZES) -> list[tuple[str, int]]:
    """The pairs of a format's name and a head size that there is a layout for."""

    def serves(name: str, dim: int) -> bool:
        return dim % 32 == 0 or 3 not in (format_of(name).key_bits, format_of(name).value_bits)

    return [(name, dim) for name in names for dim in dims if serves(name, dim)]


def random_pages(layout: PageLayout, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Pages [*shape, page bytes] of any codes; scales are of 1/2 to 2, and zeros in the middle half of their range."""
    pages = torch.randint(256, (*shape, layout.page_bytes), dtype=torch.uint8, device=device)
    meta = pages[..., layout.offsets[META] :].unflatten(-1, (-1, 4))
    meta[..., 0::2] = 144 + meta[..., 0::2] % 32
    meta[..., 1::2] = 64 + meta[..., 1::2] % 128
    return pages


@dataclass
class Batch:
    """Requests over one layer's pages, whose blocks are scattered."""

    layout: PageLayout
    scales: LayerScales
    folding: Folding
    cache: torch.Tensor
    table: torch.Tensor
    lens: list[int]
    query_lens: list[int]
    query: torch.Tensor
    own: tuple[torch.Tensor, torch.Tensor] | None = None
    window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        name: str,
        lens: list[int],
        query_lens: list[int],
        *,
        dim: int = 128,
        block: int = 16,
        kv_heads: int = 2,
        group: int = 4,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        sharpness: float = 0.5,
        padded: bool = False,
        written: bool = False,
        own: bool = True,
        sinks: bool = False,
        **more,
    ) -> Batch:
        """Make random requests.

        Args:
            name: a key of FORMATS or MIXED.
            lens: tokens of each request.
            query_lens: query tokens of each.
            dim: head size.
            block: tokens of a page.
            kv_heads: KV heads.
            group: query heads of a KV head.
            dtype: of queries.
            device: of tensors.
            sharpness: what queries are multiplied by; logits have a deviation of about 3 times it.
            padded: leave gaps between pages.
            written: the codec writes the pages of random keys and values, instead of any bytes.
            own: the query's tokens have keys and values of their own, beside those that their codes are.
            sinks: heads have sinks, from such that take next to nothing to such that take nearly all, and one of
                -infinity, which takes nothing.
            more: window and soft cap.

        """
        where = torch.device(device)
        layout = PageLayout(format_of(name), dim, block)
        scales = random_scales(kv_heads, dim)
        pad = 48 if padded else 0
        strides = (kv_heads * (layout.page_bytes + pad) + 2 * pad, layout.page_bytes + pad, layout.bytes_per_token, 1)
        blocks = sum(-(-length // block) for length in lens) + 3
        raw = torch.randint(256, (blocks * strides[0],), dtype=torch.uint8, device=where)
        cache = raw.as_strided((blocks, kv_heads, block, layout.bytes_per_token), strides)
        cache.copy_(random_pages(layout, (blocks, kv_heads), where).view(cache.shape))
        table = scattered_table(lens, block, blocks).to(where)
        query = torch.randn(sum(query_lens), kv_heads * group, dim, device=where) * sharpness
        folding = Folding.of(scales, max(lens), where)
        beside = None
        if own:
            # Slices of one product, as a model has them. The keys are near the centre of those in the pages.
            wide = torch.randn(2, sum(query_lens), kv_heads + 1, dim, device=where) * 2
            beside = tuple(x[:, 1:] for x in wide.to(dtype))
        batch = cls(layout, scales, folding, cache, table, lens, query_lens, query.to(dtype), beside, **more)
        if sinks:
            batch.sinks = torch.linspace(-6, 14, kv_heads * group, device=where)[torch.randperm(kv_heads * group)]
            batch.sinks[0] = float("-inf")
        if written:
            batch.write()
        return batch

    def write(self) -> None:
        """Let the codec write the pages of random keys, which scatter around their centres, and of random values."""
        codes = self.cache.cpu()
        for request, length in enumerate(self.lens):
            positions = torch.arange(length)
            slots = slots_of(self.table[request].cpu(), length, self.layout.block_size)
            shape = (length, self.cache.shape[1], self.layout.head_dim)
            key = codec.centres(self.scales, positions) + torch.randn(shape)
            codec.write_pages(codes, key, torch.randn(shape), slots, self.layout, self.scales, positions)
        self.cache.copy_(codes)

    @property
    def scale(self) -> float:
        return self.layout.head_dim**-0.5

    def indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence lengths and query starts, int32."""
        start = list(itertools.accumulate(self.query_lens, initial=0))
        return tuple(torch.tensor(x, dtype=torch.int32, device=self.query.device) for x in (self.lens, start))

    def attention(self, tuning=None) -> DecodeAttention:
        tokens, heads, _ = self.query.shape
        return DecodeAttention(
            self.layout, self.cache.shape[1], heads, self.query.dtype, self.query.device, len(self.lens), tokens,
            max(self.query_lens), bool(self.soft_cap), tuning,
        )  # fmt: skip

    def run(self, attention: DecodeAttention | None = None) -> torch.Tensor:
        # Rows wider than they need to be, filled with NaN: what is not written, or written elsewhere, shows.
        tokens, heads, dim = self.query.shape
        whole = torch.full((tokens, heads + 2, dim), float("nan"), dtype=self.query.dtype, device=self.query.device)
        out = whole[:, 1:-1]
        lens, start = self.indices()
        (attention or self.attention())(
            self.query,
            out,
            self.cache,
            self.table,
            lens,
            start,
            self.folding,
            self.scale,
            self.window,
            self.soft_cap,
            self.own,
            self.sinks,
        )
        assert whole[:, 0].isnan().all()
        assert whole[:, -1].isnan().all()
        return out.clone()

    def read(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values [tokens, KV heads, head_dim] of a request, float64."""
        layout, length = self.layout, self.lens[request]
        blocks = self.table[request, : -(-length // layout.block_size)].long()
        pages = self.cache[blocks].flatten(2).cpu()
        planes = {}
        for name, row in layout.row_bytes.items():
            at = layout.offsets[name]
            plane = pages[..., at : at + row * layout.block_size].unflatten(-1, (layout.block_size, row))
            planes[name] = plane.transpose(1, 2).flatten(0, 1)[:length]
        even = []
        for index, kind in enumerate(("key", "value")):
            bits, meta = layout.fmt.bits(kind), planes[META]
            codes = codec.join_planes([plane for name, plane in planes.items() if name.startswith(kind)], bits)
            even.append(codec.dequantize(codes, meta[..., 2 * index], meta[..., 2 * index + 1], bits, torch.float64))
        keys = codec.uneven_keys(even[0], self.scales, torch.arange(length))
        return keys, codec.uneven_values(even[1], self.scales)

    def want(self) -> torch.Tensor:
        """What :func:`kv_cache.reference.paged_attention` returns, in float64, on the queries' device."""
        heads, kv_heads = self.query.shape[1], self.cache.shape[1]
        out, at = torch.zeros_like(self.query, dtype=torch.float64), 0
        for request, (length, count) in enumerate(zip(self.lens, self.query_lens, strict=True)):
            if not length or not count:
                at += count
                continue
            keys, values = (x.to(self.query.device) for x in self.read(request))
            query = self.query[at : at + count].double().unflatten(1, (kv_heads, heads // kv_heads))
            scores = torch.einsum("qhgd,thd->hgqt", query, keys) * self.scale
            row, places = torch.arange(count), torch.arange(length - count, length)
            if self.own is not None:
                key, value = (x[at : at + count].double() for x in self.own)
                scores[:, :, row, places] = torch.einsum("qhgd,qhd->hgq", query, key) * self.scale
            if self.soft_cap:
                scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
            position = torch.arange(length - count, length, device=scores.device)[:, None]
            token = torch.arange(length, device=scores.device)[None]
            hidden = token > position
            if self.window:
                hidden |= token <= position - self.window
            scores = scores.masked_fill(hidden, float("-inf"))
            if self.sinks is not None:
                sink = self.sinks.double().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, sink], -1)
            weights = scores.softmax(-1)[..., :length]
            result = torch.einsum("hgqt,thd->qhgd", weights, values)
            if self.own is not None:
                result += torch.einsum("hgq,qhd->qhgd", weights[:, :, row, places], value - values[places])
            out[at : at + count] = result.flatten(1, 2)
            at += count
        return out


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN where anything is NaN."""
    return float((got.double() - want).norm() / want.norm())
