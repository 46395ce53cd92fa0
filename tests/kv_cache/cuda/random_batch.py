"""Random pages, scales and requests, and attention over them in float64 on whatever device holds them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from kv_cache.codec import unpack_nibbles, unpack_pairs
from kv_cache.formats import get_format
from kv_cache.cuda.decode import DecodeAttention
from kv_cache.cuda.folding import Folding, PositionTables
from kv_cache.layout import PageLayout
from kv_cache.rotary import HALF, MIDDLE, SPAN, CentreTable, Rotary
from kv_cache.scales import LayerScales


def random_folding(layout: PageLayout, kv_heads: int, device: torch.device, dense: bool = False) -> Folding:
    tops = [2**bits - 1 for bits in (layout.fmt.key_bits, layout.fmt.value_bits)]
    shape = (kv_heads, layout.head_dim)
    # Elements spread over about [-2, 2], with a zero anywhere near the middle.
    steps = [(torch.rand(shape, device=device) + 0.5) * 4 / top for top in tops]
    zeros = [(torch.rand(shape, device=device) * 0.4 + 0.3) * top for top in tops]
    key = torch.randn(*shape, layout.head_dim, device=device) * 4 / tops[0] / shape[1] ** 0.5 if dense else steps[0]
    return Folding(key, zeros[0], steps[1], zeros[1])


def unpack(pages: torch.Tensor, layout: PageLayout, kind: str, bits: int) -> torch.Tensor:
    """Codes [..., block_size, head_dim] of pages [..., page bytes]."""
    planes = {}
    for name, row in layout.row_bytes().items():
        at = layout.offsets()[name]
        planes[name] = pages[..., at : at + row * layout.block_size].unflatten(-1, (layout.block_size, row))
    if bits == 8:
        return planes[kind]
    codes = unpack_nibbles(planes[kind])
    return codes | unpack_pairs(planes[f"{kind}_high"]) << 4 if bits == 6 else codes


@dataclass
class Batch:
    """Requests over one layer's pages of random bytes, whose blocks are scattered."""

    layout: PageLayout
    folding: Folding
    dense: bool
    cache: torch.Tensor
    table: torch.Tensor
    lens: list[int]
    query_lens: list[int]
    query: torch.Tensor
    window: int = 0
    soft_cap: float = 0.0
    centres: CentreTable | None = None

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
        dense: bool = False,
        sharpness: float = 1.0,
        padded: bool = False,
        bias: float = 0.0,
        scales: LayerScales | None = None,
        **more,
    ) -> Batch:
        where = torch.device(device)
        layout = PageLayout(get_format(name), dim, block)
        counts = [-(-length // block) for length in lens]
        pad = 48 if padded else 0
        strides = (kv_heads * (layout.page_bytes + pad) + 2 * pad, layout.page_bytes + pad, layout.bytes_per_token, 1)
        blocks = sum(counts) + 3
        raw = torch.randint(256, (blocks * strides[0],), dtype=torch.uint8, device=where)
        cache = raw.as_strided((blocks, kv_heads, block, layout.bytes_per_token), strides)
        # Entries beyond a request's blocks must never be followed.
        table = torch.full((len(lens), max(counts, default=0) + 1), 2**30, dtype=torch.int32, device=where)
        ids = torch.randperm(blocks, device=where).int()
        for request, (start, count) in enumerate(zip(itertools.accumulate(counts, initial=0), counts, strict=False)):
            table[request, :count] = ids[start : start + count]
        query = torch.randn(sum(query_lens), kv_heads * group, dim, device=where) * sharpness
        folding = random_folding(layout, kv_heads, where, dense)
        if scales is not None:
            folding, dense = Folding.of(scales, where), scales.key_transform is not None
            more["centres"] = scales.rotary.table(max(lens)) if scales.rotary else None
        if bias:  # The logits' bias has a deviation of about `bias`.
            turned = 64 if dim == 96 else dim  # Some models rotate part of the channels.
            rotary = Rotary(10000.0 ** (-torch.arange(0, turned, 2) / turned), max(lens), interleaved=dim == 80)
            more["centres"] = rotary.table(max(lens))
            mean = torch.randn(kv_heads, dim, device=where) * bias / sharpness
            folding = replace(folding, mean=mean)
        return cls(layout, folding, dense, cache, table, lens, query_lens, query.to(dtype), **more)

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
            max(self.query_lens), bool(self.soft_cap), self.dense, self.centres is not None, tuning,
        )  # fmt: skip

    def run(self, attention: DecodeAttention | None = None) -> torch.Tensor:
        # Rows wider than they need to be, filled with NaN: what is not written, or written elsewhere, shows.
        tokens, heads, dim = self.query.shape
        whole = torch.full((tokens, heads + 2, dim), float("nan"), dtype=self.query.dtype, device=self.query.device)
        out = whole[:, 1:-1]
        lens, start = self.indices()
        (attention or self.attention())(
            self.query, out, self.cache, self.table, lens, start, self.folding, self.scale, self.window, self.soft_cap,
            self.positions(),
        )  # fmt: skip
        assert whole[:, 0].isnan().all()
        assert whole[:, -1].isnan().all()
        return out.clone()

    def positions(self) -> PositionTables | None:
        return self.centres and PositionTables.of(self.centres, self.layout.head_dim, self.query.device)

    def _centres(self, length: int) -> torch.Tensor:
        """The centres [heads, length, head_dim] of keys, by their definition but in float64."""
        table = self.centres
        far = torch.arange(length) // SPAN, torch.arange(length) % SPAN
        anchor = [x.double()[far[0]] for x in (table.anchor_cos, table.anchor_sin)]
        fine = [(x.double()[far[1]] - MIDDLE) / HALF for x in (table.cos_codes, table.sin_codes)]
        cos, sin = anchor[0] * fine[0] - anchor[1] * fine[1], anchor[1] * fine[0] + anchor[0] * fine[1]
        first, second = table.rotary.channels()
        mean = self.folding.mean.double().cpu()[:, None]
        centres = torch.zeros(mean.shape[0], length, mean.shape[2], dtype=torch.float64)
        centres[..., first] = cos * mean[..., first] - sin * mean[..., second]
        centres[..., second] = cos * mean[..., second] + sin * mean[..., first]
        return centres.to(self.query.device)

    def want(self) -> torch.Tensor:
        """The same in float64."""
        fmt, f = self.layout.fmt, self.folding
        heads, kv_heads = self.query.shape[1], self.cache.shape[1]
        out, at = torch.zeros_like(self.query, dtype=torch.float64), 0
        for request, (length, count) in enumerate(zip(self.lens, self.query_lens, strict=True)):
            if not length or not count:
                at += count
                continue
            pages = self.cache[self.table[request, : -(-length // self.layout.block_size)].long()].flatten(2)
            keys, values = (
                unpack(pages, self.layout, kind, bits).transpose(0, 1).flatten(1, 2)[:, :length].double()
                for kind, bits in (("key", fmt.key_bits), ("value", fmt.value_bits))
            )
            keys = keys - f.key_zero[:, None].double()
            values = (values - f.value_zero[:, None].double()) * f.value_scale[:, None].double()
            query = self.query[at : at + count].double().unflatten(1, (kv_heads, heads // kv_heads))
            folded = "qhgd,hde->qhge" if self.dense else "qhgd,hd->qhgd"
            query = torch.einsum(folded, query, f.key.double())
            scores = torch.einsum("qhgd,htd->hgqt", query, keys) * self.scale
            if self.centres is not None:
                rows = self.query[at : at + count].double().unflatten(1, (kv_heads, heads // kv_heads))
                scores = scores + torch.einsum("qhgd,htd->hgqt", rows, self._centres(length)) * self.scale
            if self.soft_cap:
                scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
            position = torch.arange(length - count, length, device=scores.device)[:, None]
            token = torch.arange(length, device=scores.device)[None]
            hidden = token > position
            if self.window:
                hidden |= token <= position - self.window
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[at : at + count] = torch.einsum("hgqt,htd->qhgd", weights, values).flatten(1, 2)
            at += count
        return out


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN where anything is NaN."""
    return float((got.double() - want).norm() / want.norm())
