"""The search for the streams of a trellis code: compiled, against PyTorch in float64; and the code itself."""

import functools

import pytest
import torch

from kv_cache.cuda.runtime import nvrtc
from kv_cache.errors import ParetoError
from quant_methods.formats.parts.trellis import (
    FLIP,
    INCREMENTS,
    KEEP,
    MULTIPLIERS,
    TILE_PAIRS,
    matrix_of,
    pair_values,
    states_of,
    tiles_of,
    words_of,
)
from quant_methods.kernels import trellis_search_cuda
from quant_methods.kernels.low_bit_matrix import FOLDER
from quant_methods.kernels.trellis_search import search, search_in_torch, search_on_cpu
from tests.kv_cache.cuda.devices import SHARED
from tests.kv_cache.cuda.emulator import EmulatedKernel

CAPABILITIES = {"generic": (), "avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(9)


def error(states, targets, weights=None):
    squares = (pair_values()[states].double() - targets.double()).square()
    return (squares if weights is None else squares * weights.double()).sum((1, 2))


@functools.cache
def cases(bits):
    """Targets, weights or none, and the errors that the specification reaches in float64."""
    torch.manual_seed(bits)
    found = []
    # Of rows and channels: what a scale and the error passed on ask for. One channel does not count, nor do some rows.
    rows, channels = torch.logspace(-3, 1, 5 * 32)[torch.randperm(5 * 32)], torch.rand(8) * 3
    channels[5], rows[40:44] = 0, 0
    of_matrix = tiles_of(rows[:, None] * channels)[:, 0].contiguous()
    for weights in (None, torch.rand(5, TILE_PAIRS, 2) * 3, of_matrix):
        targets = 1.15 * torch.randn(5, TILE_PAIRS, 2)
        wanted = search_in_torch(targets.double(), bits, None if weights is None else weights.double())
        found.append((targets, weights, error(wanted, targets, weights)))
    return found


def with_an_outlier():
    """A weight far beyond what any state means, which must not blur what its neighbours cost."""
    targets = 1.15 * torch.randn(3, TILE_PAIRS, 2)
    targets[:, 70, 1] = 150
    return targets


def check_beside_an_outlier(found, bits, targets):
    wanted = search_in_torch(targets.double(), bits)
    excess = error(found, targets) - error(wanted, targets)
    apart = (pair_values()[wanted].double() - targets).square()
    assert (excess <= 2e-3 * (apart.sum((1, 2)) - apart[:, 70].sum(1))).all()


def served(isa):
    return isa == "generic" or torch.backends.cpu.get_cpu_capability() in CAPABILITIES[isa]


def test_a_state_means_what_the_generators_say():
    for state in (0, 1, 255, 256, 54321, 65535):
        for place in range(2):
            mixed = (state * MULTIPLIERS[place] + INCREMENTS[place]) % 2**32
            halves = torch.tensor(
                [((half & KEEP) ^ FLIP) - 2**16 * (half >> 15) for half in (mixed % 2**16, mixed >> 16)]
            )
            wanted = halves.to(torch.int16).view(torch.bfloat16).sum()
            assert pair_values()[state, place] == wanted.float()
    # Symmetric about zero, and as wide as a Gaussian: no more than a thousandth beyond 3.2 standard deviations.
    values = pair_values()
    assert values.mean().abs() < 1e-3
    assert 2 < (values / values.std()).pow(4).mean() < 3.2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_streams_and_states(bits):
    words = torch.randint(-(2**31), 2**31, (3, 2, 8 * bits)).int()
    states = states_of(words, bits)
    assert torch.equal(words_of(states, bits), words)
    # Bit by bit, of one tile.
    stream = [int(word) % 2**32 >> bit & 1 for word in words[2, 1] for bit in range(32)]
    for pair in (0, 1, TILE_PAIRS - 1):
        window = [stream[(2 * bits * pair + i) % len(stream)] for i in range(16)]
        assert states[2, 1, pair] == sum(bit << i for i, bit in enumerate(window))
    matrix = torch.randn(64, 24)
    assert torch.equal(matrix_of(tiles_of(matrix)), matrix)
    assert torch.equal(tiles_of(matrix)[1, 2, 4:8].flatten(), matrix[33, 16:])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("bits", [2, *(pytest.param(bits, marks=pytest.mark.long) for bits in (3, 4))])
def test_the_compiled_search_finds_streams_as_close(bits, isa):
    if not served(isa):
        pytest.skip(f"this processor has no {isa}")
    for targets, weights, best in cases(bits):
        found = search_on_cpu(targets, bits, weights, isa)
        assert torch.equal(states_of(words_of(found, bits), bits), found)
        # Near ties may go another way.
        assert (error(found, targets, weights) <= 1.001 * best + 1e-6).all()


def test_the_compiled_search_beside_an_outlier():
    targets = with_an_outlier()
    check_beside_an_outlier(search_on_cpu(targets, 4), 4, targets)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_numbers_that_are_none_lead_to_no_state_that_is_none(bits):
    targets = torch.randn(2, TILE_PAIRS, 2)
    targets[0, 9], targets[1, 100, 1] = torch.nan, torch.inf
    found = search(targets, bits)
    assert found.min() >= 0
    assert found.max() < 1 << 16


@pytest.mark.parametrize(("bits", "most"), [(4, 0.0056), (3, 0.020), (2, 0.076)])
def test_the_error_on_a_gaussian_is_the_codes(bits, most):
    targets = torch.randn(24, TILE_PAIRS, 2) * pair_values().std() / 1.07
    assert error(search(targets, bits), targets).sum() < most * targets.square().sum()


def test_a_stream_is_found_again():
    words = torch.randint(-(2**31), 2**31, (2, 24)).int()
    states = states_of(words, 3)
    assert torch.equal(search(pair_values()[states], 3), states)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x: search(x, 5), "2, 3 or 4 bits, not 5"),
        (lambda x: search(x.double(), 4), "float32"),
        (lambda x: search(x[:, :64], 4), "targets"),
        (lambda x: search(x, 4, x[:1].abs()), "weights of the targets' shape"),
    ],
)
def test_what_does_not_fit_is_refused(make, said):
    with pytest.raises(ParetoError, match=said):
        make(torch.zeros(2, TILE_PAIRS, 2))


def check_kernel(bits, tiles, device):
    targets = 1.15 * torch.randn(tiles, TILE_PAIRS, 2)
    for weights in (None, torch.rand_like(targets) * 3):
        wanted = search_on_cpu(targets, bits, weights)
        given = None if weights is None else weights.to(device)
        found = trellis_search_cuda.search_on_cuda(targets.to(device), bits, given).cpu()
        assert torch.equal(states_of(words_of(found, bits), bits), found)
        best, reached = error(wanted, targets, weights), error(found, targets, weights)
        assert (reached <= 1.001 * best + 1e-6).all()


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(trellis_search_cuda, "load_kernel", EmulatedKernel)
    monkeypatch.setattr(trellis_search_cuda, "device_limits", lambda device: (1, 227 << 10, True))


@pytest.mark.parametrize(("bits", "side"), [(2, 1), (2, 2), (3, 4), (4, 2)])
def test_the_kernel_emulated(bits, side, emulated, monkeypatch):
    monkeypatch.setattr(trellis_search_cuda, "sharing", lambda tiles, bits, processors: (side, 1))
    # A block goes on to other tiles, of which some are not there.
    check_kernel(bits, side + 1, "cpu")


def test_the_kernel_emulated_beside_an_outlier(emulated):
    targets = with_an_outlier()
    check_beside_an_outlier(trellis_search_cuda.search_on_cuda(targets, 4), 4, targets)


def test_tiles_share_a_block_where_there_are_enough():
    def sharing(tiles, bits):
        return trellis_search_cuda.sharing(tiles, bits, 132)

    assert sharing(18, 4) == (1, 18)
    assert sharing(132, 4) == (1, 132)
    assert sharing(200, 4) == (2, 100)
    assert sharing(448, 3) == (4, 112)
    assert sharing(100_000, 4) == (4, 132)
    # Of 2 bits what four tiles keep would take too much memory.
    assert sharing(100_000, 2) == (2, 132)


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize(("bits", "side"), [(2, 1), (2, 2), (3, 1), (3, 4), (4, 1), (4, 2), (4, 4)])
def test_the_kernel_compiles_and_fits(bits, side, capability):
    macros = trellis_search_cuda.macros(bits, side, weighted=side > 1)
    assert dict(macros)["SHARED_BYTES"] <= SHARED[capability]
    assert nvrtc.compile_cubin("trellis_search.cu", f"sm_{capability[0]}{capability[1]}", macros, FOLDER)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tiles", [1, 200, 700])
def test_the_kernel(bits, tiles):
    check_kernel(bits, tiles, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_beside_an_outlier():
    targets = with_an_outlier()
    check_beside_an_outlier(trellis_search_cuda.search_on_cuda(targets.cuda(), 4).cpu(), 4, targets)
