"""The Triton kernel of GPTQ's loop against the loop itself, in float64, on fresh random inputs each run.

Where there is no CUDA device the tests run in Triton's interpreter, on the CPU. Triton chooses its interpreter when it
is imported, so they do so in a process of their own.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from quant_methods.formats.grid import Grid, dequantize, fit
from quant_methods.methods.feedback import BLOCK, Groups, feed_back
from quant_methods.methods.gptq import solve
from tests.triton_interpreter import run_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


pytestmark = pytest.mark.usefixtures("fresh_numbers")


class Fused(Groups):
    """Takes the kernel on the CPU too."""

    def round_block(self, work, upper, start, stop):
        from quant_methods.kernels.feedback import round_block

        self.calls = getattr(self, "calls", 0) + 1
        self.codes[start:stop] = float("nan")
        grid = self.scale, self.zero, self.groups
        return round_block(work, upper, *grid, self.codes, start, stop, self.grid.low, self.grid.high)


@pytest.mark.gpu
@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("rows", "columns", "bits", "group_size", "symmetric"),
    [(16, 64, 4, 32, False), (21, 160, 3, 32, True), (5, 192, 8, 64, False), (18, 96, 2, -1, False)],
)
def test_rounds_as_the_loop_does(rows, columns, bits, group_size, symmetric):
    grid = Grid(bits, group_size, symmetric)
    weight = torch.randn(rows, columns, device=DEVICE)
    inputs = torch.randn(4 * columns, columns, dtype=torch.float64, device=DEVICE)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    hessian = inputs.T @ inputs / len(inputs)
    order = torch.argsort(hessian.diagonal(), descending=True)
    ranges = fit(weight, grid, hessian)

    fused = Fused(grid, order, ranges)
    feed_back(weight, hessian, order, fused)
    assert fused.calls == -(-columns // BLOCK)
    exact = Groups(grid, order, tuple(part.double() for part in ranges))
    feed_back(weight.double(), hessian, order, exact)

    # A weight next to the middle of two codes may go either way in float32, and takes later ones of its row along.
    same = (fused.codes == exact.codes).all(0)
    assert same.float().mean() >= 0.6

    def loss(codes):
        back = torch.empty_like(codes)
        back[order] = codes
        error = dequantize(back.T, *ranges).double() - weight.double()
        return ((error @ hessian) * error).sum(1)

    torch.testing.assert_close(loss(fused.codes.double())[same], loss(exact.codes)[same])
    assert loss(fused.codes.double()).sum() < 1.05 * loss(exact.codes).sum()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_solve_takes_it():
    weight, grid = torch.randn(64, 512, device="cuda"), Grid(4, 128, False)
    inputs = torch.randn(2048, 512, dtype=torch.float64, device="cuda")
    hessian = inputs.T @ inputs / 2048
    codes, scale, _ = solve(weight, hessian, grid)
    want = solve(weight.cpu(), hessian.cpu(), grid)
    assert (codes.cpu() == want[0]).float().mean() > 0.98
    torch.testing.assert_close(scale.cpu(), want[1])


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter():
    assert "4 passed" in run_interpreted(__file__)
