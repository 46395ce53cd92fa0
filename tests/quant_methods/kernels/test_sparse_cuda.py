"""The kernel that adds single weights to a bulk's result, against float64: on a GPU, and its source on a CPU."""

import functools
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from kv_cache.cuda.runtime import launch, nvrtc
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.kernels import beside_cuda, low_bit_matrix, sparse_cuda
from quant_methods.kernels.beside import Beside, BesideParts
from quant_methods.kernels.sparse_cuda import BOUNDS
from tests.kv_cache.cuda.emulator import EmulatedKernel
from tests.quant_methods.kernels.graphs import check_layers_in_a_graph
from tests.quant_methods.kernels.test_beside import apart, make, poisoned, rounded_once

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(sparse_cuda, "load_kernel", EmulatedKernel)
    monkeypatch.setattr(sparse_cuda, "device_limits", lambda device: (3, 227 << 10, True))
    return CPU


def of_lengths(lengths, width, dtype, device):
    """Single weights, so many in each row, and the weight in float64."""
    chosen = torch.stack([torch.randperm(width) < length for length in lengths])
    dense = torch.where(chosen, torch.randn(chosen.shape), 0).to(dtype)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)]).int()
    sparse = Sparse(starts, chosen.nonzero()[:, 1].int(), dense[chosen])
    return Beside([sparse], dtype).to(device), dense.double().to(device)


def check(tokens, beside, weight, dtype, device):
    out, width = weight.shape
    x = apart(tokens, width, dtype=dtype, device=device)
    # Neither rows of the inputs nor of the bulk's results are aligned with what is around them, which is poison.
    around = torch.full((tokens + 1, out + 3), torch.nan, dtype=dtype, device=device)
    y = around[:tokens, 1 : out + 1]
    y.copy_(torch.randn(tokens, out))
    wanted = y.double() + x.double() @ weight.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        result = beside_cuda.add_on_cuda(y, x, beside.parts(x))
        assert result.is_contiguous()
        assert rounded_once(result, wanted)
        # The same in place, and behind the bulk; which is launched when nothing that it needs is missing.
        bulk, found = y.clone(), y
        found.fill_(torch.nan)
        assert beside_cuda.add_on_cuda(found, x, beside.parts(x), bulk=lambda: found.copy_(bulk)) is found
    assert torch.equal(found, result)
    assert around.isnan().sum() == around.numel() - y.numel()


TOKENS = (1, 2, 3, 5, 8, 9, 17, 33, 64)
FEW = (1, 3, 9, 64)
LENGTHS = {
    "uneven": (0, 3, 90, 8, 9, 64, 65, 32, 33, 0, 12, 7, 1, 15, 16, 31, 17, 2, 0, 40, 5, 18, 70, 6, 25, 4, 21, 10, 0),
    "one whole row": (*[9] * 37, 300, *[11] * 30),
    "all long": (*[260, 131, 300, 299] * 9,),
    "one row of many chunks": (9, 3000, 7),
    "none": (0,) * 33,
}


@pytest.mark.parametrize("tokens", [one if one in FEW else pytest.param(one, marks=pytest.mark.long) for one in TOKENS])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_emulated_sums(lengths, tokens, emulated, monkeypatch):
    monkeypatch.setattr(sparse_cuda, "OWN_SHARE", 0)  # So that what is left of long rows is shared out.
    for dtype in (torch.bfloat16, torch.float16) if lengths == "uneven" else (torch.bfloat16,):
        beside, weight = of_lengths(LENGTHS[lengths], max(300, *LENGTHS[lengths]), dtype, emulated)
        check(tokens, beside, weight, dtype, emulated)


@pytest.mark.parametrize("tokens", [1, 16])
def test_emulated_sums_of_a_rows_own_lanes_alone(tokens, emulated, monkeypatch):
    monkeypatch.setattr(sparse_cuda, "LEAST_OWN", 300)
    check(tokens, *of_lengths(LENGTHS["one whole row"], 300, torch.bfloat16, emulated), torch.bfloat16, emulated)


def test_inputs_that_are_not_finite_stay_in_their_rows_and_tokens(emulated):
    beside, weight = of_lengths((5, 0, 64, 3, 70), 100, torch.bfloat16, emulated)
    for tokens in (1, 3, 16):
        x, y = torch.randn(tokens, 100).bfloat16(), torch.randn(tokens, 5).bfloat16()
        x[0, 0] = torch.inf
        found = beside_cuda.add_on_cuda(y, x, beside.parts(x))
        assert found[0].isfinite().tolist() == (weight[:, 0] == 0).tolist()
        assert found[1:].isfinite().all()


@pytest.mark.parametrize("tokens", [2, 4, 5, 8, 24, 64])
def test_emulated_inputs_turned_around(tokens, emulated, monkeypatch):
    for width in (3, 64, 131):
        x = apart(tokens, width, dtype=torch.bfloat16, device=emulated)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
            turned = sparse_cuda.turn(x)
        assert torch.equal(turned[:-1, :tokens], x.T)
        assert not turned[:, tokens:].any()
        assert not turned[-1].any()


class Recorder:
    """In place of a kernel, to see what is launched."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def launch(self, grid, threads, params, device, overlap=False):
        self.launches.append((self.name, bool(params.early), overlap))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
def test_only_right_behind_unknown_kernels_are_inputs_waited_for(tokens, overlap, monkeypatch):
    launches = []
    monkeypatch.setattr(sparse_cuda, "device_limits", lambda device: (3, 227 << 10, overlap))
    monkeypatch.setattr(sparse_cuda, "load_kernel", lambda source, name, *_, **__: Recorder(name, launches))
    beside, _ = of_lengths((3, 5, 9), 40, torch.bfloat16, CPU)
    x, y = torch.zeros(tokens, 40).bfloat16(), torch.zeros(tokens, 3).bfloat16()
    beside_cuda.add_on_cuda(y, x, beside.parts(x))
    beside_cuda.add_on_cuda(y, x, beside.parts(x), bulk=lambda: launches.append("bulk"))
    turned = [("turn", False, overlap)] if tokens > 1 else []
    assert launches == [*turned, ("sparse", False, overlap), *turned, "bulk", ("sparse", True, overlap)]


def test_with_other_parts_in_between_inputs_are_there(monkeypatch):
    launches = []

    def add_dense(y, x, low, index, ends, result=None):
        launches.append(("dense", result is y))
        return y.clone() if result is None else result

    monkeypatch.setattr(sparse_cuda, "device_limits", lambda device: (3, 227 << 10, True))
    monkeypatch.setattr(sparse_cuda, "load_kernel", lambda source, name, *_, **__: Recorder(name, launches))
    monkeypatch.setitem(sys.modules, "quant_methods.kernels.beside_triton", SimpleNamespace(add=add_dense))
    beside, _ = make(3, 40, 2, 0, True, torch.bfloat16, CPU)
    x, y = torch.zeros(2, 40).bfloat16(), torch.zeros(2, 3).bfloat16()
    assert beside_cuda.add_on_cuda(y, x, beside.parts(x)) is not y
    assert launches == [("turn", False, True), ("dense", False), ("sparse", True, True)]
    launches.clear()
    assert beside_cuda.add_on_cuda(y, x, beside.parts(x), bulk=lambda: launches.append("bulk")) is y
    assert launches == [("turn", False, True), "bulk", ("dense", True), ("sparse", True, True)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_it_compiles(arch):
    for tokens, dtype in zip(BOUNDS, itertools.cycle((torch.bfloat16, torch.float16)), strict=False):
        assert nvrtc.compile_cubin("sparse.cu", arch, sparse_cuda.macros(tokens, dtype), low_bit_matrix.FOLDER)


def test_with_nothing_beside_it_the_bulk_is_the_result():
    y, x, launches = torch.randn(2, 5).bfloat16(), torch.randn(2, 8).bfloat16(), []
    assert beside_cuda.add_on_cuda(y, x, BesideParts(), bulk=lambda: launches.append("bulk")) is y
    assert launches == ["bulk"]


def test_what_is_compiled_ahead_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    every = [sparse_cuda.macros(tokens, torch.float16) for tokens in (1, 2)]
    launch.compile_ahead("sparse.cu", every, CPU, low_bit_matrix.FOLDER)
    before = nvrtc.compile_cubin.cache_info()
    for macros in every:
        assert nvrtc.compile_cubin("sparse.cu", "sm_90", macros, low_bit_matrix.FOLDER)
    assert nvrtc.compile_cubin.cache_info().misses == before.misses


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_sums(tokens, dtype):
    device = torch.device("cuda", 0)
    for lengths in LENGTHS.values():
        check(tokens, *of_lengths(lengths, max(300, *lengths), dtype, device), dtype, device)
    check(tokens, *of_a_model(4100, 2048, dtype, device), dtype, device)


def of_a_model(out, width, dtype, device):
    """0.45% of the weights, and of every hundredth row a tenth, of one all."""
    lengths = torch.binomial(torch.full((out,), float(width)), torch.tensor(0.0045)).int()
    lengths[::100] = width // 10
    lengths[out // 2] = width
    return of_lengths(lengths.tolist(), width, dtype, device)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("behind", ["nothing", "other kernels"])
@pytest.mark.parametrize("kept", [0, 41])
def test_a_graph_replays_layers_that_overlap(kept, behind):
    device, size = torch.device("cuda", 0), 4096
    beside, _ = of_a_model(size, size, torch.bfloat16, device)
    beside.values /= 8
    if kept:
        columns, _ = make(size, size, kept, 0, False, torch.bfloat16, device)
        beside.index, beside.ends = columns.index, columns.ends / 8
    beside.prepare(size)
    for tokens, own in itertools.product((1, 2, 4, 8, 16, 32, 64), (False, True)):
        x = torch.randn(tokens, size, device=device, dtype=torch.bfloat16)

        def layer(x, own):
            parts = beside.parts(x)
            if not own:
                return beside_cuda.add_on_cuda(x / 2, x, parts)
            y = x.new_empty(x.shape)
            return beside_cuda.add_on_cuda(y, x, parts, bulk=lambda: torch.mul(x, 0.5, out=y))

        check_layers_in_a_graph(functools.partial(layer, own=own), x, lambda i: behind == "other kernels")
