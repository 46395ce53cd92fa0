"""Does a bitmap of zeros gain time on a CPU? One core, one token: a prototype in C beside vLLM's kernel of 4-bit codes.

The prototypes are what AVX-512 makes cheapest: `vpexpandb` takes the codes that are left to their places, 64 at a
time. With 16-bit inputs, two byte permutations make bfloat16 numbers of them for `vdpbf16ps`; with inputs rounded to 8
bits, as vLLM does where a CPU has AMX, `vpdpbusd` multiplies by them as they are. A row's 64 weights have a word of 64
bits of the bitmap; its codes are two to a byte, from a whole byte on. They are for this comparison alone: symmetric
grids, groups of 128, a layout of their own.

Matrices are read in turn, more than the caches hold (or --megabytes), so that memory is part of what is measured.

    OMP_NUM_THREADS=1 python -m bench.lab.bitmap_on_cpu
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.grid_codes import GridCodes

GROUP = 128
SOURCE = r"""
#include <immintrin.h>
#include <stdint.h>

/* Rows at a time: where the next codes of a row are is known only when bits are counted. */
#define ROWS 4
#define EACH _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r)

/* The next codes of 64 weights, a byte each. */
static inline __m512i next(const uint8_t **from, uint64_t present) {
    const __m512i packed = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)*from));
    *from += (_mm_popcnt_u64(present) + 1) / 2;
    return _mm512_and_si512(_mm512_or_si512(packed, _mm512_slli_epi16(packed, 4)), _mm512_set1_epi8(15));
}

/* y[row] of rows with groups of 128: bits [rows][columns / 64], codes two to a byte, starts [rows] in bytes, scales. */
void multiply(const uint64_t *bits, const uint8_t *codes, const int64_t *starts, const float *scales,
              const uint8_t *x, float *y, int64_t rows, int64_t columns) {
    uint8_t low[64], high[64];
    for (int i = 0; i < 64; ++i) {
        union { float f; uint32_t u; } v = {(float)(i % 16 < 8 ? i % 16 : i % 16 - 16)};
        low[i] = v.u >> 16 & 255, high[i] = v.u >> 24;
    }
    const __m512i lows = _mm512_loadu_si512(low), highs = _mm512_loadu_si512(high);
    const int64_t words = columns / 64, groups = columns / 128;
    for (int64_t row = 0; row < rows; row += ROWS) {
        const uint8_t *from[ROWS];
        __m512 total[ROWS], sum[ROWS];
        EACH from[r] = codes + starts[row + r], total[r] = _mm512_setzero_ps();
        for (int64_t group = 0; group < groups; ++group) {
            EACH sum[r] = _mm512_setzero_ps();
            for (int64_t word = 2 * group; word < 2 * group + 2; ++word) {
                const __m512bh first = (__m512bh)_mm512_loadu_si512(x + 128 * word);
                const __m512bh second = (__m512bh)_mm512_loadu_si512(x + 128 * word + 64);
                EACH {
                    const uint64_t present = bits[(row + r) * words + word];
                    const __m512i all = _mm512_maskz_expand_epi8(present, next(from + r, present));
                    const __m512i l = _mm512_shuffle_epi8(lows, all), h = _mm512_shuffle_epi8(highs, all);
                    sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_unpacklo_epi8(l, h), first);
                    sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_unpackhi_epi8(l, h), second);
                }
            }
            EACH total[r] = _mm512_fmadd_ps(sum[r], _mm512_set1_ps(scales[(row + r) * groups + group]), total[r]);
        }
        EACH y[row + r] = _mm512_reduce_add_ps(total[r]);
    }
}

/* The same of inputs of 8 bits. Codes are 0 to 15 instead of -8 to 7; sums [columns / 128] are 8 times a group's. */
void multiply_rounded(const uint64_t *bits, const uint8_t *codes, const int64_t *starts, const float *scales,
                      const int8_t *x, float *y, int64_t rows, int64_t columns, const float *sums) {
    const __m512i zeros = _mm512_set1_epi8(8);
    const int64_t words = columns / 64, groups = columns / 128;
    for (int64_t row = 0; row < rows; row += ROWS) {
        const uint8_t *from[ROWS];
        __m512 total[ROWS];
        __m512i sum[ROWS];
        float less[ROWS] = {0};
        EACH from[r] = codes + starts[row + r], total[r] = _mm512_setzero_ps();
        for (int64_t group = 0; group < groups; ++group) {
            EACH sum[r] = _mm512_setzero_si512();
            for (int64_t word = 2 * group; word < 2 * group + 2; ++word) {
                const __m512i inputs = _mm512_loadu_si512(x + 64 * word);
                EACH {
                    const uint64_t present = bits[(row + r) * words + word];
                    const __m512i all = _mm512_mask_expand_epi8(zeros, present, next(from + r, present));
                    sum[r] = _mm512_dpbusd_epi32(sum[r], all, inputs);
                }
            }
            EACH {
                const float scale = scales[(row + r) * groups + group];
                total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), _mm512_set1_ps(scale), total[r]);
                less[r] += scale * sums[group];
            }
        }
        EACH y[row + r] = _mm512_reduce_add_ps(total[r]) - less[r];
    }
}
"""


def compiled() -> ctypes.CDLL:
    """Return the prototype.

    Raises:
        ParetoError: the CPU or the compiler cannot.

    """
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "avx512_vbmi2" not in flags or "avx512_bf16" not in flags:
        raise ParetoError("this CPU has no AVX-512 with VBMI2 and BF16, which the prototype is written for")
    folder = Path(tempfile.mkdtemp(prefix="bitmap-on-cpu-"))
    (folder / "prototype.c").write_text(SOURCE)
    command = [
        os.environ.get("CC", "gcc"),
        "-O3",
        "-march=native",
        "-shared",
        "-fPIC",
        "prototype.c",
        "-o",
        "prototype.so",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParetoError(f"the prototype does not compile: {done.stderr.strip().splitlines()[0]}")
    return ctypes.CDLL(str(folder / "prototype.so"))


class Prototype:
    """A matrix with a bitmap."""

    def __init__(self, library: ctypes.CDLL, grid: GridCodes, rounds: bool) -> None:
        self.library, (self.rows, self.columns), self.rounds = library, grid.shape, rounds
        present = (grid.codes != 0).view(self.rows, -1, 64)
        weights = torch.ones(64, dtype=torch.int64) << torch.arange(64)
        self.bits = (present.long() * weights).sum(-1)
        counts = (present.sum(-1) + 1) // 2
        self.starts = torch.nn.functional.pad(counts.sum(1).cumsum(0), (1, 0))
        first = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))[:-1]
        place = 2 * first.view(self.rows, -1, 1) + present.cumsum(-1) - 1
        nibbles = torch.zeros(2 * int(self.starts[-1]) + 64, dtype=torch.uint8)
        codes = grid.codes.view(present.shape)[present]
        nibbles[place[present]] = ((codes + 8 if rounds else codes) & 15).to(torch.uint8)
        self.codes = nibbles[0::2] | nibbles[1::2] << 4
        self.scales = grid.scale.float().contiguous()

    def stored(self) -> int:
        """Return its bytes, with scales in 16 bits."""
        return 8 * self.bits.numel() + self.codes.numel() + 2 * self.scales.numel()

    def apply(self, x: Tensor) -> Tensor:
        """Return the product with one token, bfloat16 [1, columns], as float32 [rows]."""
        y = torch.empty(self.rows)
        size = ctypes.c_int64(self.rows), ctypes.c_int64(self.columns)
        if self.rounds:
            step = x.float().abs().max() / 127
            rounded = (x.float() / step).round().to(torch.int8)
            sums = 8.0 * rounded.view(-1, GROUP).sum(1, dtype=torch.int32)
            tensors = self.bits, self.codes, self.starts, self.scales, rounded, y
            pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
            self.library.multiply_rounded(*pointers, *size, ctypes.c_void_p(sums.data_ptr()))
            return y * step
        # Of each 64 bytes `unpacklo` takes the first eight of each sixteen, `unpackhi` the others.
        ordered = x.view(-1, 4, 2, 8).transpose(1, 2).contiguous()
        tensors = self.bits, self.codes, self.starts, self.scales, ordered, y
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
        self.library.multiply(*pointers, *size)
        return y


def matrix(rows: int, columns: int, zeros: float) -> GridCodes:
    """Return random codes of which a share is zero."""
    codes = torch.randint(1, 8, (rows, columns), dtype=torch.int8) * (2 * torch.randint(0, 2, (rows, columns)) - 1)
    codes = torch.where(torch.rand(rows, columns) < zeros, 0, codes.to(torch.int8))
    scale = (torch.rand(rows, columns // GROUP) + 0.5).bfloat16()
    return GridCodes(
        codes.to(torch.int8), scale, torch.zeros(rows, columns // GROUP, dtype=torch.int8), 4, symmetric=True
    )


def seconds(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Return the least seconds that a call takes, of repeats that make all."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for call in calls:
            call()
        best = min(best, time.perf_counter() - start)
    return best / len(calls)


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="output channels (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=4096, help="input channels (default: %(default)s)")
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.5, 0.6], help="shares of zeros")
    parser.add_argument("--megabytes", type=int, default=256, help="that are read in turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="of which the fastest counts (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.columns % GROUP or args.rows % 32:
            raise ParetoError(f"{args.rows} x {args.columns}: expected rows in 32s and columns in groups of {GROUP}")
        library = compiled()
    except ParetoError as error:
        print(f"bitmap_on_cpu: error: {error}", file=sys.stderr)
        return 2
    from vllm_ext.bulk import grid_on_cpu
    from vllm_ext.compat import (
        VllmConfig,
        init_distributed_environment,
        initialize_model_parallel,
        set_current_vllm_config,
    )

    torch.set_num_threads(1)
    # Linux lets a process use AMX's tiles once it has asked; vLLM's kernels rely on that.
    torch.cpu._init_amx()
    with set_current_vllm_config(VllmConfig()):
        where = tempfile.mkdtemp(prefix="bitmap-on-cpu-")
        init_distributed_environment(1, 0, f"file://{where}/ranks", 0, "gloo")
        initialize_model_parallel()
    x = torch.randn(1, args.columns).bfloat16()
    dense_bytes = args.rows * args.columns // 2 + 2 * args.rows * args.columns // GROUP
    copies = max(args.megabytes * 2**20 // dense_bytes, 1)
    grid = matrix(args.rows, args.columns, args.zeros[0])
    weight = torch.randn(args.rows, args.columns).bfloat16()
    print("| weights | bits | us | GB/s |\n| --- | ---: | ---: | ---: |")

    def row(name: str, stored: int, calls: Sequence[Callable[[], object]]) -> None:
        took = seconds(calls, args.repeats)
        bits = 8 * stored / (args.rows * args.columns)
        print(f"| {name} | {bits:.2f} | {1e6 * took:.0f} | {stored / took / 1e9:.1f} |", flush=True)

    dense = [weight.clone() for _ in range(max(copies // 4, 1))]
    row("bfloat16", 2 * weight.numel(), [partial(torch.nn.functional.linear, x, w) for w in dense])
    for setting in ("0", "1"):
        os.environ["VLLM_CPU_INT4_W4A8"] = setting
        with set_current_vllm_config(VllmConfig()):
            kernels = [grid_on_cpu(grid, "none", torch.bfloat16) for _ in range(copies)]
            what = "inputs rounded to 8 bits" if setting == "1" else "16-bit inputs"
            row(f"vLLM, 4 bits, {what}", dense_bytes, [partial(kernel.apply, x) for kernel in kernels])
    for share in args.zeros:
        grid = matrix(args.rows, args.columns, share)
        wanted = (x.double() @ grid.read().double().T)[0]
        for rounds, what in ((False, "16-bit inputs"), (True, "inputs rounded to 8 bits")):
            first = Prototype(library, grid, rounds)
            off = (first.apply(x).double() - wanted).norm() / wanted.norm()
            assert off < (0.02 if rounds else 1e-3), f"the prototype is wrong by {off:.3g}"
            several = [first, *(Prototype(library, grid, rounds) for _ in range(copies - 1))]
            row(f"bitmap, {100 * share:.0f}% zeros, {what}", first.stored(), [partial(one.apply, x) for one in several])
    return 0


if __name__ == "__main__":
    sys.exit(main())
