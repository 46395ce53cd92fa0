"""Which arrangement of the low-bit kernel's work is fastest: every one in question, checked and timed on a GPU.

For each width and number of columns, arrangements of ``quant_methods/kernels/low_bit_matrix.py`` on each of the four
matrices of a layer of Mistral-7B's shape (or --matrices). Each result is compared with the expanded weights' product,
and with itself when repeated. Prints the best for each matrix beside what is chosen without measuring.

    python -m bench.lab.weight_kernel_tuning --out results/gpu-weight-kernel/tuning.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.files import write_json
from bench.gpu_timer import graph_seconds
from bench.lab.weight_kernel_bench import ALONE, MISTRAL, low_bit_matrices, sizes
from kv_cache.cuda.runtime.device import RESERVED_SHARED, device_limits
from kv_cache.cuda.runtime.launch import compile_ahead
from kv_cache.errors import ParetoError
from quant_methods.kernels.low_bit_matrix import FOLDER, Arrangement, PackedMatrix, column_tiles

SCHEMA = "vllm-pareto/gpu-weight-kernel-tuning/1"
MOST_ERROR = 4e-3
"""Of a result against bfloat16 weights' product in float32, relative, by norms: both are rounded to 8 bits."""


def arrangements(matrix: PackedMatrix, tokens: int, stages: list[int], units: list[int]) -> list[Arrangement]:
    """Return the arrangements in question that fit into the device's shared memory."""
    _, shared, _ = device_limits(matrix.words.device)
    tiles = column_tiles(tokens)
    if tiles == 1:
        warps = [(8, 1), (8, 2), (8, 4), (16, 2), (16, 4), (4, 1), (4, 2)]
    elif tiles == 2:
        warps = [(8, 2), (8, 4), (8, 8), (16, 4), (16, 8), (4, 2), (4, 4)]
    else:
        warps = [(8, 4), (8, 8), (4, 2), (4, 4)]
    found = []
    each = itertools.product(warps, stages, (False, True), (False, True), units)
    for (count, rows), depth, whole, alone, wide in each:
        if alone and rows * tokens > 8:  # Too many copies of the activations.
            continue
        for blocks in {4: (2, 3), 8: (1, 2, 3) if tiles == 1 else (1, 2), 16: (1,)}[count]:
            if tiles > 4 and blocks * count > 8:  # Registers.
                continue
            if wide > 1 and matrix.kind == "bitmap":  # Which has no kernel for it.
                continue
            one = Arrangement(count, rows, depth, blocks, whole, alone, wide)
            bytes_ = matrix.shared_bytes(one, tokens)
            if blocks * (bytes_ + RESERVED_SHARED) <= shared + RESERVED_SHARED:
                found.append(one)
    return found


def measure(
    what: str, shapes: list[tuple[int, int]], columns: list[int], stages: list[int], units: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Return the time of every arrangement on every matrix with every number of columns."""
    rows = []
    for out_rows, channels in shapes:
        matrices = [module.matrix() for module in low_bit_matrices(what, out_rows, channels)[0]]
        first = matrices[0]
        weight = first.expand(torch.bfloat16, 0, first.tiles)
        for tokens in columns:
            x = torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16)
            expected = x.float() @ weight.float().T
            y = torch.empty(tokens, out_rows, device="cuda", dtype=torch.bfloat16)
            tried = arrangements(first, tokens, stages, units)
            chosen = first.arrangement(tokens)
            if chosen not in tried:
                tried.append(chosen)
            macros = {first.macros(torch.bfloat16, tokens, one) for one in tried}
            compile_ahead("low_bit.cu", macros, first.words.device, FOLDER)
            for one in tried:
                y.fill_(torch.nan)
                first.multiply(x, y, one)
                again = torch.empty_like(y)
                first.multiply(x, again, one)
                error = float((y.float() - expected).norm() / expected.norm())
                calls: list[Callable[[], Any]] = [functools.partial(m.multiply, x, y, one) for m in matrices]
                rows.append(
                    {
                        "weights": what,
                        "matrix": [out_rows, channels],
                        "columns": tokens,
                        "arrangement": list(astuple(one)),
                        "chosen": one == chosen,
                        "right": error < MOST_ERROR and torch.equal(y, again),
                        "error": error,
                        "us": 1e6 * graph_seconds(calls, repeats),
                    }
                )
        del matrices, first
        torch.cuda.empty_cache()
    return rows


def fastest(rows: list[dict[str, Any]], keep: int) -> list[dict[str, Any]]:
    """Return the fastest arrangements of each case, and what is chosen without measuring."""
    kept: list[dict[str, Any]] = []
    for case in dict.fromkeys(_case(row) for row in rows):
        ordered = sorted((row for row in rows if _case(row) == case), key=lambda row: row["us"])
        kept += ordered[:keep] + [row for row in ordered[keep:] if row["chosen"]]
    return kept


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["weights"], tuple(row["matrix"]), row["columns"]


def report(rows: list[dict[str, Any]]) -> str:
    """Return lines: for each width and number of columns, the best for each matrix and the best one for all."""
    lines = ["(warps/row_warps/stages/blocks/whole/alone/units)"]
    wrong = [row for row in rows if not row["right"]]
    lines += [f"WRONG: {row}" for row in wrong[:20]]
    for what, tokens in sorted({(row["weights"], row["columns"]) for row in rows}):
        mine = [row for row in rows if (row["weights"], row["columns"]) == (what, tokens)]
        shapes = sorted({tuple(row["matrix"]) for row in mine})
        chosen = sum(row["us"] for row in mine if row["chosen"])
        parts, best_sum = [], 0.0
        for shape in shapes:
            these = sorted((row for row in mine if tuple(row["matrix"]) == shape), key=lambda row: row["us"])
            best_sum += these[0]["us"]
            best = ", ".join(f"{_short(row)} {row['us']:.1f}" for row in these[:3])
            now = next(row for row in these if row["chosen"])
            parts.append(f"    {shape[0]}x{shape[1]}: {best}; chosen {_short(now)} {now['us']:.1f}")
        sums: dict[str, list[float]] = {}
        for row in mine:
            sums.setdefault(_short(row), []).append(row["us"])
        whole = sorted((sum(times), name) for name, times in sums.items() if len(times) == len(shapes))
        lines.append(
            f"{what} bits, {tokens} columns: best {best_sum:.1f}, chosen {chosen:.1f} us a layer; one for all:"
        )
        lines.append("    " + ", ".join(f"{name} {time:.1f}" for time, name in whole[:6]))
        lines += parts
    return "\n".join(lines)


def _short(row: dict[str, Any]) -> str:
    return "/".join(str(int(value)) for value in row["arrangement"])


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", nargs="+", default=list(MISTRAL), metavar="ROWSxCHANNELS", help="of a layer")
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 8, 16, 32, 64], metavar="N", help="batch sizes")
    parser.add_argument(
        "--ours",
        nargs="+",
        default=["3", "4"],
        choices=ALONE,
        help="widths (default: 3 4)",
    )
    parser.add_argument("--stages", nargs="+", type=int, default=[3, 4, 6], metavar="N", help="(default: 3 4 6)")
    parser.add_argument(
        "--units", nargs="+", type=int, default=[1, 2], choices=(1, 2), help="of a warp in a step (default: 1 2)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="replays (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=6, metavar="N", help="fastest to keep of each (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    args = parser.parse_args(argv)
    try:
        if not torch.cuda.is_available():
            raise ParetoError("no CUDA device here: this measures a GPU's kernels")
        shapes = sizes(args.matrices)
        rows = []
        for what in args.ours:
            rows += measure(what, shapes, args.columns, args.stages, args.units, args.repeats)
            document = {"schema": SCHEMA, "environment": environment(), "measured": len(rows)}
            write_json(args.out, document | {"rows": fastest(rows, args.keep)})
            print(f"{what} bits: measured", file=sys.stderr, flush=True)
    except ParetoError as error:
        print(f"weight_kernel_tuning: error: {error}", file=sys.stderr)
        return 2
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
