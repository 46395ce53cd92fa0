"""Time of a decoding step's products with quantized weights on a GPU, without an engine: ours, vLLM's Marlin, bfloat16.

``4+columns``, ``3-table+sparse`` and ``4-table+sparse`` are ours with what lies beside the bulk: 1% of the input
channels kept apart, 0.45% of the weights stored singly. The rows without it say what that costs. ``4-2of4`` is 4-bit
codes of which two in four are kept, on the sparse tensor cores. ``4-bitmap50`` and ``4-bitmap60`` store a bit for each
weight and the codes of those that are not zero: 50 or 60% are, by chance.

The four matrices of a layer of Mistral-7B's shape (or --matrices), random codes, groups of 128, CUDA graphs (up to 512
tokens) over enough copies that nothing is read from the L2 cache; medians of repeats. The rate is that of the stored
bytes, beside that of a copy on the same device.

    python -m bench.lab.weight_kernel_bench --out results/gpu-weight-kernel/kernel.json
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.files import write_json
from bench.gpu_timer import copy_rate, graph_seconds, median_seconds
from kv_cache.errors import ParetoError
from quant_methods.formats.parts.bitmap_codes import BitmapCodes
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.part import Draw
from quant_methods.formats.parts.semi_sparse import SemiSparseForm
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.parts.trellis_codes import TrellisForm
from quant_methods.kernels.beside import Beside
from quant_methods.kernels.low_bit_cuda import LowBitCUDA, LowBitPart

SCHEMA = "vllm-pareto/gpu-weight-kernel/1"
MISTRAL = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")
OURS = ("2", "3", "4", "5", "6", "7", "3-table", "4-table", "2-trellis", "3-trellis", "4-trellis", "4-2of4")
BITMAPS = {"bitmap50": 0.5, "bitmap60": 0.6}
"""Shares of zeros."""
BESIDE = ("4+columns", "3-table+sparse", "4-table+sparse")
ALONE = (*OURS, *(f"4-{kind}" for kind in BITMAPS))
ALL = (*ALONE, *BESIDE)
KEPT_SHARE = 0.01
"""Of input channels: LLM.int8's outliers."""
SPARSE_SHARE = 0.0045
"""Of weights (Kim et al., SqueezeLLM, 2023, section 4.2)."""
BYTES_IN_TURN = 512 << 20
"""Weights that the calls of one graph read in turn, at least: ten times the L2 cache of an H100."""
MOST_COPIES = 48
GROUP = 128
CAPTURED = 512
"""Tokens of the largest CUDA graph that vLLM captures by default; products of more are launched one by one here too."""

Product = Callable[[torch.Tensor], torch.Tensor]


def dense(rows: int, channels: int) -> tuple[list[Product], int]:
    """Return products with several bfloat16 matrices, and the bytes of one."""
    copies = _copies(2 * rows * channels)
    weights = [torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return [functools.partial(torch.nn.functional.linear, weight=w) for w in weights], 2 * rows * channels


def low_bit_matrices(what: str, rows: int, channels: int) -> tuple[list[LowBitCUDA], int]:
    """Return several of our matrices, and the bytes that the kernel reads of one."""
    bits, kind = int(what[0]), what[2:]
    low = 0 if kind == "table" else -(1 << (bits - 1))
    codes = torch.randint(low, low + (1 << bits), (rows, channels), device="cuda", dtype=torch.int8)
    groups = torch.rand(rows, channels // GROUP, device="cuda", dtype=torch.bfloat16)
    draw = Draw(1.0, torch.bfloat16, torch.device("cuda"))
    part: LowBitPart
    if kind == "trellis":
        part = TrellisForm(bits, GROUP).random(rows, channels, draw)
    elif kind == "2of4":
        part = SemiSparseForm(bits, GROUP, symmetric=False).random(rows, channels, draw)
    elif kind == "table":
        part = TableCodes(codes, torch.randn(rows, 1 << bits, device="cuda", dtype=torch.bfloat16))
    else:
        part = grid = GridCodes(codes, groups, groups.round().to(torch.int8), bits)
        if kind in BITMAPS:
            zero = grid.zero_point.repeat_interleave(GROUP, 1)
            # What is left is not zero, so that the share of zeros is what the name says.
            codes = torch.where(codes == zero, zero ^ 1, codes)
            grid.codes = torch.where(torch.rand(rows, channels, device="cuda") < BITMAPS[kind], zero, codes)
            part = BitmapCodes.of(grid)
    first = LowBitCUDA(part, torch.bfloat16)
    stored = sum(t.numel() * t.element_size() for t in first.buffers())
    matrices = [first]
    for _ in range(_copies(stored) - 1):
        matrices.append(copy.deepcopy(first))
    return matrices, stored


def low_bit(what: str, rows: int, channels: int) -> tuple[list[Product], int]:
    """Return products with several of our matrices, and the bytes that the kernels read of one."""
    bulk, _, part = what.partition("+")
    matrices, stored = low_bit_matrices(bulk, rows, channels)
    if not part:
        return [matrix.apply for matrix in matrices], stored
    first = random_columns(rows, channels) if part == "columns" else random_sparse(rows, channels)
    first.prepare(channels, functools.partial(matrices[0].apply, beside=first))
    stored += sum(t.numel() * t.element_size() for t in first.buffers())
    parts = [first, *(copy.deepcopy(first) for _ in matrices[1:])]
    both = zip(matrices, parts, strict=True)
    return [functools.partial(matrix.apply, beside=beside) for matrix, beside in both], stored


def random_columns(rows: int, channels: int) -> Beside:
    """Return input channels kept apart."""
    kept = round(channels * KEPT_SHARE)
    index = torch.randperm(channels, device="cuda")[:kept].sort().values
    return Beside([Columns(index, torch.randn(rows, kept, device="cuda"))], torch.bfloat16)


def random_sparse(rows: int, channels: int) -> Beside:
    """Return weights stored singly, of which rows have numbers that differ by chance."""
    chosen = torch.rand(rows, channels, device="cuda") < SPARSE_SHARE
    starts = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0)).int()
    columns = chosen.nonzero()[:, 1].int()
    sparse = Sparse(starts, columns, torch.randn(len(columns), device="cuda", dtype=torch.bfloat16))
    return Beside([sparse], torch.bfloat16)


def marlin(rows: int, channels: int) -> tuple[list[Product], int]:
    """Return products of vLLM's Marlin with several 4-bit matrices, and the bytes of one."""
    from vllm_ext.compat import (
        apply_gptq_marlin_linear,
        marlin_make_empty,
        marlin_make_workspace_new,
        scalar_types,
    )

    device = torch.device("cuda")
    scales = torch.rand(channels // GROUP, rows, device="cuda", dtype=torch.bfloat16)
    workspace, nothing = marlin_make_workspace_new(device), marlin_make_empty(device)
    stored = rows * channels // 2 + 2 * scales.numel()

    def product() -> Product:
        shape = channels // 16, rows * 2
        words = torch.randint(-(1 << 31), (1 << 31) - 1, shape, device="cuda", dtype=torch.int32)
        return lambda x: apply_gptq_marlin_linear(
            x, words, scales, nothing, workspace, scalar_types.uint4b8, rows, channels
        )

    return [product() for _ in range(_copies(stored))], stored


def _copies(stored: int) -> int:
    return max(min(-(-BYTES_IN_TURN // stored), MOST_COPIES), 2)


def measure(matrices: list[tuple[int, int]], columns: list[int], ours: list[str], repeats: int) -> list[dict[str, Any]]:
    """Return a row for each kind of weight and number of columns: the layer's time and that of each matrix."""
    makers: dict[str, Callable[[int, int], tuple[list[Product], int]]] = {"bfloat16": dense, "Marlin, 4 bits": marlin}
    for what in ours:
        bulk, plus, part = what.partition("+")
        makers[f"ours, {bulk} bits{plus and ' + '}{part}"] = functools.partial(low_bit, what)
    rows = []
    for name, make in makers.items():
        seconds: dict[int, list[float]] = {count: [] for count in columns}
        stored = 0
        for shape in matrices:
            products, size = make(*shape)
            stored += size
            for count in columns:
                x = torch.randn(count, shape[1], device="cuda", dtype=torch.bfloat16)
                calls: list[Callable[[], Any]] = [functools.partial(product, x) for product in products]
                seconds[count].append((graph_seconds if count <= CAPTURED else seconds_apart)(calls, repeats))
            del products
            torch.cuda.empty_cache()
        for count, times in seconds.items():
            rows.append(
                {
                    "weights": name,
                    "columns": count,
                    "bytes": stored,
                    "matrices_us": [1e6 * t for t in times],
                    "layer_us": 1e6 * sum(times),
                    "bytes_per_second": stored / sum(times),
                }
            )
            print(f"{name}, {count} columns: {1e6 * sum(times):.1f} us a layer", file=sys.stderr, flush=True)
    return rows


def seconds_apart(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Return the median seconds of one of ``calls``, launched one after the other."""
    return median_seconds(lambda: [call() for call in calls], repeats) / len(calls)


def table(rows: list[dict[str, Any]], ceiling: float) -> str:
    """Return the rows as Markdown, relative to Marlin."""
    columns = sorted({row["columns"] for row in rows})
    base = {row["columns"]: row["layer_us"] for row in rows if row["weights"].startswith("Marlin")}
    lines = [
        "| weights | " + " | ".join(f"{count} columns: us a layer (Marlin = 1), GB/s" for count in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name in dict.fromkeys(row["weights"] for row in rows):
        found = {row["columns"]: row for row in rows if row["weights"] == name}
        cells = []
        for count in columns:
            time, rate = found[count]["layer_us"], found[count]["bytes_per_second"]
            cells.append(f"{time:.1f} ({time / base[count]:.2f}), {rate / 1e9:,.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"A copy on this device: {ceiling / 1e9:,.0f} GB/s."])


def sizes(words: list[str]) -> list[tuple[int, int]]:
    """Return the (rows, channels) that ``--matrices`` names.

    Raises:
        ParetoError: a word is not ROWSxCHANNELS.

    """
    try:
        return [(int(rows), int(channels)) for rows, channels in (word.split("x") for word in words)]
    except ValueError:
        raise ParetoError(f"--matrices {' '.join(words)}: expected ROWSxCHANNELS, e.g. 4096x14336") from None


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", nargs="+", default=list(MISTRAL), metavar="ROWSxCHANNELS", help="of a layer")
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 8, 16, 32, 64], metavar="N", help="batch sizes")
    parser.add_argument("--ours", nargs="+", default=list(ALL), choices=ALL, help="ours (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="replays (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    args = parser.parse_args(argv)
    try:
        if not torch.cuda.is_available():
            raise ParetoError("no CUDA device here: this measures a GPU's kernels")
        matrices = sizes(args.matrices)
        ceiling = copy_rate()
        rows = measure(matrices, args.columns, args.ours, args.repeats)
        document = {
            "schema": SCHEMA,
            "matrices": matrices,
            "group_size": GROUP,
            "copy_bytes_per_second": ceiling,
            "environment": environment(),
            "rows": rows,
        }
        write_json(args.out, document)
    except ParetoError as error:
        print(f"weight_kernel_bench: error: {error}", file=sys.stderr)
        return 2
    print(table(rows, ceiling))
    return 0


if __name__ == "__main__":
    sys.exit(main())
