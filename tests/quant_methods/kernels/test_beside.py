"""What lies beside a layer's bulk, by PyTorch and by the Triton kernels, against float64 on new random inputs each run.

The kernel for single weights has its own tests (``test_sparse_cuda.py``). Where there is no CUDA device the others run
in Triton's interpreter, on the CPU. Triton chooses its interpreter when it is imported, so those tests run in a process
of their own; in float16, since it has no products in bfloat16.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.kernels.beside import FUSED_TOKENS, Beside, add_beside, add_beside_in_torch, add_to_weight_in_torch
from tests.triton_interpreter import run_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
kernel = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device")

CASES = [
    # tokens, out, in, kept columns, rank, sparse
    (1, 37, 64, 5, 0, False),
    (3, 70, 640, 300, 0, False),
    (8, 16, 50, 0, 3, False),
    (1, 37, 300, 0, 0, True),
    (8, 33, 300, 0, 0, True),
    (3, 21, 70, 17, 20, True),
    (33, 40, 70, 0, 2, True),
    (33, 40, 70, 9, 0, False),
    (64, 20, 48, 3, 1, False),
]
DENSE_CASES = [case[:5] for case in CASES if case[3] or case[4]]


pytestmark = pytest.mark.usefixtures("fresh_numbers")


def apart(*shape, dtype, device):
    """Rows that lie apart, with poison between them."""
    storage = torch.full((shape[0], shape[1] + 24), torch.nan, dtype=dtype, device=device)
    storage[:, 8 : 8 + shape[1]] = torch.randn(shape, device=device)
    return storage[:, 8 : 8 + shape[1]]


def make(out, width, kept, rank, sparse, dtype, device):
    """Return what lies beside a bulk, and its weight in float64."""
    weight = torch.zeros(out, width, dtype=torch.float64)
    parts = []
    if kept:
        index = torch.randperm(width)[:kept].sort().values.int()
        columns = torch.randn(out, kept).to(dtype)
        weight[:, index.long()] += columns.double()
        parts.append(Columns(index, columns))
    if rank:
        parts.append(LowRank(torch.randn(out, rank).to(dtype), (torch.randn(rank, width) / 2).to(dtype)))
    if sparse:
        # Rows without any, rows with a few, a row with all, and none at the end.
        chosen = torch.rand(out, width) < torch.rand(out, 1) ** 4
        chosen[[0, out // 2, out - 1]] = False
        chosen[out // 3] = True
        dense = torch.where(chosen, torch.randn(out, width), 0).to(dtype)
        weight += dense.double()
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)]).int()
        parts.append(Sparse(starts, chosen.nonzero()[:, 1].int(), dense[chosen]))
    return Beside(parts, dtype).to(device), weight.to(device)


def expected(beside, weight, y, x):
    wanted = y.double() + x.double() @ weight.T
    if beside.down is not None:
        kept = len(beside.ends) - len(beside.down)
        # The first product is rounded, like any other of the model.
        wanted += torch.nn.functional.linear(x, beside.down).double() @ beside.ends[kept:].double()
    return wanted


def rounded_once(result, wanted, before=0):
    """Whether numbers are off by half a unit in the last place, and by what float32 sums may add.

    ``before`` is what was rounded once before: of a sum that another kernel adds to.
    """
    bound = torch.finfo(result.dtype).eps / 2 * (wanted.abs() + abs(before)) + 2e-5 * wanted.abs().max()
    return bool(((result.double() - wanted).abs() <= bound).all())


def poisoned(new_empty):
    def of(self, *shape, **options):
        made = new_empty(self, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return of


@pytest.mark.gpu
@kernel
@pytest.mark.parametrize(("tokens", "out", "width", "kept", "rank"), DENSE_CASES)
def test_the_kernel_adds_what_the_weights_mean(tokens, out, width, kept, rank, monkeypatch):
    from quant_methods.kernels.beside_triton import add

    beside, weight = make(out, width, kept, rank, False, DTYPE, DEVICE)
    y, x = (apart(tokens, size, dtype=DTYPE, device=DEVICE) for size in (out, width))
    wanted = expected(beside, weight, y, x)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    result = add(y, x, *beside.parts(x)[:3])
    assert result.shape == (tokens, out)
    assert result.is_contiguous()
    assert rounded_once(result, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kept", "rank", "sparse"), [(41, 0, False), (143, 32, False), (300, 16, True), (0, 0, True)])
def test_graphs_replay_it(kept, rank, sparse, dtype):
    """Shapes of a model, every number of tokens that is arranged in another way, and one past the kernel's."""
    out, width = 6144, 4096
    beside, weight = make(out, width, kept, rank, False, dtype, "cuda")
    if sparse:
        chosen = torch.rand(out, width) < 0.005
        dense = torch.where(chosen, torch.randn(out, width), 0).to(dtype)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)]).int()
        beside.starts, beside.inputs = starts.cuda(), chosen.nonzero()[:, 1].int().cuda()
        beside.values = dense[chosen].cuda()
        dense_weight, weight = weight, weight + dense.double().cuda()
    beside.prepare(width)
    for tokens in (1, 2, 8, 9, 17, 32, 33, 64, 65):
        y, x = (apart(tokens, size, dtype=dtype, device="cuda") for size in (out, width))
        beside(y, x)  # What cuBLAS allocates is not to be captured.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = beside(y, x)
        y.copy_(torch.randn(y.shape))
        x.copy_(torch.randn(x.shape))
        graph.replay()
        wanted = expected(beside, weight, y, x)
        both = sparse and (kept or rank)
        assert (
            rounded_once(result, wanted, expected(beside, dense_weight, y, x) if both else 0)
            if tokens <= FUSED_TOKENS
            else torch.allclose(result.double(), wanted, rtol=0.02, atol=0.02 * wanted.std().item())
        )


def check_weight(add_to, kept, sparse, dtype, device, out=53, width=70):
    """Some rows of a weight get their part, and what lies around them stays poison."""
    beside, added = make(out, width, kept, 2, sparse, dtype, device)
    around = torch.full((out + 2, width), torch.nan, dtype=dtype, device=device)
    first, last = 3, out - 1
    weight = around[first + 1 : last + 1]
    weight.copy_(torch.randn(weight.shape))
    wanted = weight.double() + added[first:last]
    add_to(weight, first, beside.parts(torch.zeros(1, width, dtype=dtype, device=device)))
    # Where a single weight lies in a channel kept apart the sum is rounded twice.
    assert torch.allclose(weight.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    assert around.isnan().sum() == around.numel() - weight.numel()
    assert not torch.equal(wanted, weight.double() - added[first:last])


WEIGHT_CASES = [(17, False), (0, True), (40, True)]


@pytest.mark.gpu
@kernel
@pytest.mark.parametrize(("kept", "sparse"), WEIGHT_CASES)
def test_the_kernel_adds_to_a_weight(kept, sparse):
    from quant_methods.kernels.beside_triton import merge

    check_weight(merge, kept, sparse, DTYPE, DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="has nothing to do with Triton")
@pytest.mark.parametrize(("kept", "sparse"), WEIGHT_CASES)
def test_pytorch_adds_to_a_weight(kept, sparse):
    check_weight(add_to_weight_in_torch, kept, sparse, torch.bfloat16, "cpu")


@pytest.mark.skipif(INTERPRETED, reason="has nothing to do with Triton")
@pytest.mark.parametrize(("tokens", "out", "width", "kept", "rank", "sparse"), CASES)
def test_pytorch_adds_what_the_weights_mean(tokens, out, width, kept, rank, sparse):
    beside, weight = make(out, width, kept, rank, sparse, torch.float32, "cpu")
    y, x = (apart(tokens, size, dtype=torch.float32, device="cpu") for size in (out, width))
    torch.testing.assert_close(beside(y, x).double(), expected(beside, weight, y, x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="has nothing to do with Triton")
def test_it_is_an_operator_that_compilers_can_trace():
    beside, _ = make(21, 40, 3, 2, True, torch.float32, "cpu")
    y, x = torch.randn(4, 21), torch.randn(4, 40)
    parts = beside.parts(x)
    torch.library.opcheck(add_beside, (y, x, list(parts)))
    assert torch.equal(add_beside(y, x, list(parts)), add_beside_in_torch(y, x, parts))
    assert not y.isnan().any()


@pytest.mark.gpu
@kernel
@pytest.mark.parametrize("out", [16, 4096, 6144, 28672, 128256])
def test_tiles_keep_a_device_busy_and_cover_the_tokens(out):
    from quant_methods.kernels.beside_triton import ENOUGH_PROGRAMS, MOST_ROWS, MOST_TOKENS, TOKENS, tile

    for tokens in TOKENS:
        rows, own = tile(out, tokens)
        assert tokens % own == 0
        programs = -(-out // rows) * (tokens // own)
        assert programs >= ENOUGH_PROGRAMS or (rows, own) == (32, 8)
        assert rows * own <= MOST_ROWS * MOST_TOKENS


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter():
    assert f"{len(DENSE_CASES) + len(WEIGHT_CASES) + 5} passed" in run_interpreted(__file__)
