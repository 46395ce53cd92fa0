"""Time of everything that a layer's quantized KV cache takes on a GPU, apart from the engine.

``step`` is a decode step: the new tokens' keys and values are stored, queries prepared, and the context attended to.
``store`` and ``gather`` are those of a prompt's piece: storing its tokens, and reading as many earlier ones back beside
copying the fresh ones. Every figure is the median of CUDA-graph replays over several layers' scales and pages in turn,
so that nothing comes from the L2 cache. Scales are random.

    python -m bench.lab.layer_bench --out results/gpu-layer/layer.json
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.files import write_json
from bench.gpu_timer import copy_rate, graph_seconds
from bench.lab.kernel_bench import random_pages
from kv_cache.cuda.constants import LayerConstants
from kv_cache.cuda.decode import DecodeAttention
from kv_cache.cuda.folding import Folding
from kv_cache.cuda.read import gather, plan
from kv_cache.cuda.store import store
from kv_cache.formats import FORMATS, get_format
from kv_cache.layout import PageLayout
from kv_cache.rotary import Rotary
from kv_cache.scales import MATRIX_DTYPE, LayerScales
from kv_cache.transforms import mirror

SCHEMA = "vllm-pareto/gpu-layer/2"
SHAPES = ("1x2048", "8x2048", "32x2048", "32x8192", "8x32768")
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
LAYERS = 8
BYTES_IN_TURN = 1 << 29


def random_layer(rotary: Rotary) -> LayerScales:
    """Return scales that take as long as calibrated ones; what they make of keys is none of a benchmark's business."""
    matrix = torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM).mul(HEAD_DIM**-0.5).to(MATRIX_DTYPE).float()
    mean = torch.randn(KV_HEADS, HEAD_DIM)
    return LayerScales(mean, mean, matrix, matrix.mT.contiguous(), torch.ones(KV_HEADS), mirror(mean), rotary)


class Layers:
    """A few layers' caches, with the tokens of a decode step or of a prompt's piece.

    Args:
        name: of the format.
        batch: requests.
        context: tokens of each, the new ones included.
        fresh: new tokens of each.

    """

    def __init__(self, name: str, batch: int, context: int, fresh: int = 1) -> None:
        device = torch.device("cuda", 0)
        self.layout = PageLayout(get_format(name), HEAD_DIM, BLOCK)
        rotary = Rotary.over(HEAD_DIM, 1e6 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM), context)
        layers = [random_layer(rotary) for _ in range(LAYERS)]
        self.constants = [LayerConstants.of(self.layout, layer, device, context) for layer in layers]
        self.foldings = [Folding.of(layer, context, device) for layer in layers]
        self.bytes = batch * context * KV_HEADS * self.layout.bytes_per_token
        self.turns = max(2, math.ceil(BYTES_IN_TURN / self.bytes))
        self.cache, self.tables = random_pages(self.layout, KV_HEADS, batch, context, self.turns, device)
        at = torch.arange(context - fresh, context, device=device)
        self.positions = at.repeat(batch)
        blocks = self.tables[:, :, at // BLOCK].long() * BLOCK + at % BLOCK
        self.slots = blocks.flatten(1).contiguous()
        tokens = batch * fresh
        self.query, self.out = (torch.randn(tokens, HEADS, HEAD_DIM, device=device).bfloat16() for _ in range(2))
        self.key, self.value = (torch.randn(tokens, KV_HEADS, HEAD_DIM, device=device).bfloat16() for _ in range(2))
        self.lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.start = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.apart = torch.zeros(1, dtype=torch.int32, device=device)  # No request reads what another one stores.
        if fresh == 1:
            self.attention = DecodeAttention(self.layout, KV_HEADS, HEADS, torch.bfloat16, device, batch, batch)
        else:
            self.tiles = plan([context - fresh] * batch, [fresh] * batch).to(device)
            rows = (batch * context, KV_HEADS, HEAD_DIM)
            self.whole = (
                torch.empty(rows, dtype=torch.bfloat16, device=device),
                torch.empty(rows, dtype=torch.bfloat16, device=device),
            )

    def store(self, turn: int) -> bool:
        """Store the new tokens."""
        slots = self.slots[turn % self.turns]
        return store(self.constants[turn % LAYERS], self.cache, self.key, self.value, slots, self.positions)

    def attend(self, turn: int, beside: bool = False) -> None:
        """Prepare and attend."""
        folding = self.foldings[turn % LAYERS]
        own = self.key, self.value
        self.attention.prepare(self.query, folding, HEAD_DIM**-0.5, beside, own, self.apart)
        self.attention.attend(self.out, self.cache, self.tables[turn % self.turns], self.lens, self.start, folding)

    def step(self, turn: int) -> None:
        """Do a decode step."""
        self.attend(turn, self.store(turn))

    def gather(self, turn: int) -> None:
        """Gather earlier and fresh tokens."""
        constants, table = self.constants[turn % LAYERS], self.tables[turn % self.turns]
        gather(constants, self.cache, self.whole, (self.key, self.value), table, self.tiles)

    def seconds(self, work: str, repeats: int) -> float:
        """Return the median seconds of one method."""
        turns = range(max(LAYERS, min(self.turns, 32)))
        return graph_seconds([lambda t=t: getattr(self, work)(t) for t in turns], repeats)  # type: ignore[misc]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch x context of decode steps")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of a prompt's piece")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    ceiling = copy_rate()
    print(f"{torch.cuda.get_device_name()}: copy {ceiling / 1e9:.0f} GB/s", flush=True)
    rows: list[dict[str, Any]] = []
    for name in args.formats:
        for shape in args.shapes:
            batch, context = map(int, shape.split("x"))
            layers = Layers(name, batch, context)
            times = {work: 1e6 * layers.seconds(work, args.repeats) for work in ("store", "attend", "step")}
            rate = layers.bytes / times["step"] / 1e3
            rows.append({"format": name, "batch": batch, "context": context, "step_gb_per_s": rate, "us": times})
            text = ", ".join(f"{work} {us:.1f} us" for work, us in times.items())
            print(f"{name:14} {shape:>8}: {text} ({rate:.0f} GB/s)", flush=True)
            del layers
        layers = Layers(name, 2, args.prompt, args.prompt // 2)
        times = {work: 1e6 * layers.seconds(work, args.repeats) for work in ("store", "gather")}
        rows.append({"format": name, "prompt": args.prompt, "us": times})
        print(
            f"{name:14} prompt: store {args.prompt} tokens {times['store']:.1f} us, gather as many, half of them "
            f"earlier ones, {times['gather']:.1f} us",
            flush=True,
        )
        del layers
    if args.out:
        command = "python -m bench.lab.layer_bench " + " ".join(sys.argv[1:] if argv is None else argv)
        write_json(
            args.out,
            {
                "schema": SCHEMA, "command": command, "environment": environment(), "copy_gb_per_s": ceiling / 1e9,
                "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK},
                "rows": rows,
            },
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
