"""Bandwidth of the CUDA decode-attention kernel, against the device's copy rate.

Every figure is the median of CUDA-graph replays over random code bytes, scattered blocks and several caches in turn,
so that nothing is read from the L2 cache. Bytes are those of the pages, scales and zeros included. ``attend`` is the
attention kernel by itself, ``prepare`` the small kernel before it that prepares its queries, ``call`` both.

    python -m bench.lab.kernel_bench --out results/gpu-decode-kernel/kernel.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu_timer import copy_rate, graph_seconds
from kv_cache.cuda.decode import DecodeAttention
from kv_cache.cuda.folding import Folding
from kv_cache.cuda.tuning import Tuning
from kv_cache.formats import FORMATS, get_format
from kv_cache.layout import META, PageLayout
from kv_cache.rotary import Rotary
from kv_cache.scales import LayerScales
from kv_cache.transforms import mirror

SCHEMA = "vllm-pareto/gpu-decode-kernel/2"
SHAPES = ("1x2048", "8x2048", "32x2048", "32x8192", "8x32768")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": {"mixed": True},
    "query4": {"query_len": 4},
    "query8": {"query_len": 8},
}
BYTES_IN_TURN = 1 << 30
"""Codes that the calls of one graph read in turn, at least: 20 times the L2 cache of an H100."""
CALLS = 32, 64
"""Least and most calls of a graph, so that starting it does not count."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        format: of the KV cache.
        batch: requests.
        context: tokens of each.
        query_len: query tokens of each.
        mixed: whether lengths are drawn evenly from 128 to ``context`` instead.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: channels of a head.
        block_size: tokens of a page.

    """

    format: str
    batch: int
    context: int
    query_len: int = 1
    mixed: bool = False
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16


def random_pages(
    layout: PageLayout, kv_heads: int, batch: int, context: int, turns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one pool of scattered pages, and block tables of which no two turns read the same page.

    Returns:
        uint8 [blocks, KV heads, block_size, bytes per token] and int32 [turns, batch, blocks of a sequence].

    """
    pages = math.ceil(context / layout.block_size)
    shape = (turns * batch * pages, kv_heads, layout.block_size, layout.bytes_per_token)
    cache = torch.randint(256, shape, dtype=torch.uint8, device=device)
    # Scales of about 1 and zeros in the middle, as of real tokens: how often sums are rescaled depends on the logits.
    meta = cache.flatten(2)[..., layout.offsets[META] :].unflatten(-1, (-1, 4))
    meta[..., 0::2] = 152 + meta[..., 0::2] % 16
    meta[..., 1::2] = 112 + meta[..., 1::2] % 32
    return cache, torch.randperm(shape[0], device=device).int().view(turns, batch, pages)


class Problem:
    """Caches, tables and queries of one case.

    Args:
        case: what is measured.
        tuning: fields of ``kv_cache.cuda.tuning.Tuning`` that differ from the choice for this device.

    """

    def __init__(self, case: Case, tuning: dict[str, int] | None = None) -> None:
        device = torch.device("cuda")
        self.layout = PageLayout(get_format(case.format), case.head_dim, case.block_size)
        self.scale = case.head_dim**-0.5
        self.lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
        if case.mixed:
            self.lens.random_(128, case.context + 1)
        self.bytes = int(self.lens.sum()) * case.kv_heads * self.layout.bytes_per_token
        turns = max(2, math.ceil(BYTES_IN_TURN / self.bytes))
        self.cache, self.tables = random_pages(self.layout, case.kv_heads, case.batch, case.context, turns, device)
        self.start = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.query_len
        tokens = case.batch * case.query_len
        self.query = torch.randn(tokens, case.heads, case.head_dim, device=device).bfloat16()
        self.out = torch.empty_like(self.query)
        self.own = tuple(torch.randn(2, tokens, case.kv_heads, case.head_dim, device=device).bfloat16())

        head = torch.randn(case.kv_heads, case.head_dim)
        matrix = torch.randn(*head.shape, case.head_dim) * self.scale
        inv_freq = 10000.0 ** (-torch.arange(0, case.head_dim, 2) / case.head_dim)
        rotary = Rotary.over(case.head_dim, inv_freq, case.context)
        scales = LayerScales(head, head, matrix, matrix, torch.ones(case.kv_heads), mirror(head), rotary)
        self.folding = Folding.of(scales, case.context, device)

        def attention(choice: Tuning | None) -> DecodeAttention:
            return DecodeAttention(
                self.layout, case.kv_heads, case.heads, self.query.dtype, device, case.batch, tokens,
                max_query_len=case.query_len, tuning=choice,
            )  # fmt: skip

        self.attention = attention(None)
        if tuning:
            self.attention = attention(replace(self.attention.tuning, **tuning))  # type: ignore[arg-type]

    def prepare(self) -> None:
        """Prepare the queries."""
        self.attention.prepare(self.query, self.folding, self.scale, own=self.own)

    def attend(self, turn: int) -> None:
        """Attend with prepared queries to the pages of one turn."""
        self.attention.attend(self.out, self.cache, self.tables[turn], self.lens, self.start, self.folding)

    def call(self, turn: int) -> None:
        """Prepare and attend."""
        self.prepare()
        self.attend(turn)

    def measure(self, repeats: int) -> dict[str, Any]:
        """Return times and rates."""
        turns = self.tables.shape[0]
        order = [turn % turns for turn in range(min(max(turns, CALLS[0]), CALLS[1]))]
        prepare = graph_seconds([self.prepare] * CALLS[0], repeats)
        attend = graph_seconds([lambda t=t: self.attend(t) for t in order], repeats)  # type: ignore[misc]
        call = graph_seconds([lambda t=t: self.call(t) for t in order], repeats)  # type: ignore[misc]
        return {
            "bytes": self.bytes,
            "prepare_us": prepare * 1e6,
            "attend_us": attend * 1e6,
            "attend_gb_per_s": self.bytes / attend / 1e9,
            "call_us": call * 1e6,
            "call_gb_per_s": self.bytes / call / 1e9,
            "tuning": asdict(self.attention.tuning),
            "blocks": self.attention.blocks,
        }


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch x context")
    parser.add_argument("--variants", nargs="+", default=["plain"], choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tuning", nargs="*", default=[""], help="e.g. warps=4,stages=4; several are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    ceiling = copy_rate()
    print(f"{torch.cuda.get_device_name()}: copy {ceiling / 1e9:.0f} GB/s")
    rows = []
    for variant in args.variants:
        for name in args.formats:
            for shape in args.shapes:
                batch, context = map(int, shape.split("x"))
                case = Case(name, batch, context, **VARIANTS[variant])
                for text in args.tuning:
                    tuning = {k: int(v) for k, _, v in (part.partition("=") for part in text.split(",") if part)}
                    row = Problem(case, tuning).measure(args.repeats)
                    row["attend_of_copy"] = row["attend_gb_per_s"] * 1e9 / ceiling
                    rows.append({"variant": variant, **asdict(case), **row})
                    print(
                        f"{variant:8} {name:14} {shape:>8} attend {row['attend_us']:7.1f} us "
                        f"{row['attend_gb_per_s']:5.0f} GB/s ({row['attend_of_copy']:.3f} of copy), prepare "
                        f"{row['prepare_us']:4.1f} us, both {row['call_us']:7.1f} us {row['call_gb_per_s']:5.0f} GB/s "
                        f"{text}",
                        flush=True,
                    )
    if args.out:
        properties = torch.cuda.get_device_properties(0)
        result = {
            "schema": SCHEMA,
            "command": "python -m bench.lab.kernel_bench " + " ".join(sys.argv[1:] if argv is None else argv),
            "device": {
                "name": properties.name,
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "l2_bytes": properties.L2_cache_size,
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
            "copy_gb_per_s": ceiling / 1e9,
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
