"""The low-bit kernel's sparse variant against the weight that 2:4 codes mean: on a GPU, and its source on a CPU."""

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.parts.part import Draw
from quant_methods.formats.parts.semi_sparse import SemiSparseForm
from quant_methods.kernels import low_bit_cuda
from quant_methods.kernels.beside import Beside
from quant_methods.kernels.low_bit import LowBitLinear
from quant_methods.kernels.low_bit_cuda import LowBitCUDA, low_bit_module
from quant_methods.kernels.low_bit_layout import pack_semi_sparse
from quant_methods.kernels.semi_sparse_product import available, semi_sparse_product, serves
from tests.quant_methods.kernels.test_low_bit_cuda import (
    ARRANGEMENTS,
    CPU,
    check,
    check_arrangement,
    gpu,
    random_layer,
)

SHAPES = [
    # bits, rows, channels, group size, columns, dtype
    (4, 40, 264, -1, 1, torch.bfloat16),
    (4, 32, 160, 32, 9, torch.bfloat16),
    (4, 33, 384, 64, 17, torch.float16),
    (4, 70, 256, 128, 26, torch.float16),
    (4, 64, 512, 256, 64, torch.bfloat16),  # Groups that the kernel has two for.
    (4, 24, 1280, 128, 70, torch.bfloat16),
    (4, 50, 8, -1, 140, torch.bfloat16),
    (4, 50, 200, -1, 130, torch.float16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_semi_sparse(shape, emulated):
    check(*shape, emulated, kind="semi_sparse")


@pytest.mark.parametrize("shape", ARRANGEMENTS, ids=str)
def test_emulated_arrangements_of_semi_sparse(shape, emulated):
    check_arrangement(4, *shape, emulated, kind="semi_sparse")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_place_and_code_of_semi_sparse_means_exactly_what_it_says(dtype, emulated):
    """Without scales, weights are integers: expanded, and multiplied by the columns of an identity, to the last bit."""
    layer = random_layer(4, 64, 128, -1, dtype, emulated, kind="semi_sparse")
    layer.scale.fill_(1.0)
    assert len(torch.unique(layer.places.int() * 256 + (layer.codes[:, ::2] + 8) * 16 + layer.codes[:, 1::2] + 8)) > 900
    matrix = LowBitCUDA(layer, dtype)
    assert torch.equal(matrix.weight().float(), layer.read())
    one = torch.eye(128, dtype=dtype)
    found = torch.cat([matrix.apply(some) for some in one.split(32)])
    assert torch.equal(found.T.float(), layer.read())


def test_every_kept_code_and_place_has_its_own_bits():
    """Two matrices that differ in one code or nibble differ in one word, in as many bits."""
    layer = random_layer(4, 40, 200, -1, torch.bfloat16, CPU, kind="semi_sparse")
    codes = (layer.codes.int() + 8).to(torch.uint8)
    packed = pack_semi_sparse(codes, layer.places)
    assert packed.shape == (2, 2, 384)
    for row, at in ((0, 0), (39, 49), (17, 33), (8, 16)):
        other, moved = codes.clone(), layer.places.clone()
        other[row, 2 * at + at % 2] ^= 15
        moved[row, at] ^= 15
        for changed in (pack_semi_sparse(other, layer.places), pack_semi_sparse(codes, moved)):
            (word,) = (packed ^ changed)[packed != changed].tolist()
            assert bin(word & 0xFFFFFFFF).count("1") == 4


def test_semi_sparse_codes_that_no_kernel_serves_run_in_pytorch(emulated):
    layer = SemiSparseForm(4, 16, symmetric=False).random(1100, 96, Draw(1.0, torch.bfloat16, emulated))
    with pytest.raises(ParetoError, match="groups of which 32 divides the channels, not of 16"):
        LowBitCUDA(layer, torch.bfloat16)
    with pytest.raises(ParetoError, match="serves 2:4 codes on a grid of 4 bits, 16-bit activations"):
        LowBitCUDA(layer, torch.float32)
    module = low_bit_module(layer, torch.bfloat16)
    assert isinstance(module, LowBitLinear)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    expected = x.double() @ layer.read().to(torch.bfloat16).double().T
    assert ((module.apply(x).double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()


@pytest.mark.parametrize("rank", [0, 3])
def test_products_of_many_tokens_leave_zeros_out(rank, emulated, monkeypatch):
    """Without cuSPARSELt, which a CPU has not: what stands for it here says what it was given."""
    given = []

    def multiply(compressed, dense, *, transpose_result):
        assert transpose_result
        given.append(dense.shape)
        return (compressed @ dense).T

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(low_bit_cuda, "serves", lambda x, rows: x.shape[0] >= 130 and rows == 64)
    layer = random_layer(4, 64, 128, -1, torch.bfloat16, emulated, kind="semi_sparse")
    matrix = LowBitCUDA(layer, torch.bfloat16)
    beside = Beside([LowRank(torch.randn(64, rank), torch.randn(rank, 128))] if rank else [], torch.bfloat16)
    for tokens in (129, 131, 144):
        x = torch.randn(tokens, 128).to(torch.bfloat16)
        expected = x.double() @ layer.read().double().T
        found = matrix.apply(x, beside).double()
        if rank:
            expected += beside(torch.zeros(tokens, 64, dtype=torch.bfloat16), x).double()
        # Weights and results are rounded.
        size = x.double().abs() @ layer.read().double().abs().T
        assert ((found - expected).abs() <= 2**-7 * expected.abs() + 2**-8 * size / 2).all()
    assert given == [(128, 144), (128, 144)]


def test_products_with_channels_kept_apart_multiply_zeros(emulated, monkeypatch):
    """A channel kept apart may make three weights of four."""
    monkeypatch.setattr(low_bit_cuda, "serves", lambda x, rows: True)
    monkeypatch.setattr(low_bit_cuda, "semi_sparse_product", lambda x, weight: pytest.fail("not 2:4"))
    layer = random_layer(4, 64, 128, -1, torch.bfloat16, emulated, kind="semi_sparse")
    beside = Beside([Columns(torch.tensor([5]), torch.randn(64, 1))], torch.bfloat16)
    assert LowBitCUDA(layer, torch.bfloat16).apply(torch.randn(200, 128).to(torch.bfloat16), beside).shape == (200, 64)


def test_the_door_of_products_of_many_tokens():
    x, weight = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    for bad in ((x.half(), weight), (x, weight[:, ::2]), (x[:, :32], weight), (x, weight[:31]), (x, weight.T)):
        with pytest.raises(ParetoError, match="a product with 2:4 weights"):
            semi_sparse_product(*bad)
    assert not serves(x, 32)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64, 2048), (4096, 4096, 2049), (6144, 4096, 4100), (512, 14336, 8192)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_semi_sparse_products_of_many_tokens(shape, dtype):
    rows, channels, tokens = shape
    device = torch.device("cuda", 0)
    layer = random_layer(4, rows, channels, -1, dtype, device, kind="semi_sparse")
    x = torch.randn(tokens, channels, device=device).to(dtype)
    if not available():
        pytest.skip("PyTorch without cuSPARSELt, or a device without sparse tensor cores")
    assert serves(x, rows)
    weight = LowBitCUDA(layer, dtype).weight().double()
    expected = x.double() @ weight.T
    found = LowBitCUDA(layer, dtype).apply(x).double()
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    size = x.double().abs() @ weight.abs().T
    assert ((found - expected).abs() <= rounding * expected.abs() + 1e-5 * size).all()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, (4, 4096, 4096, 128, 8, torch.bfloat16), (4, 500, 14336, 64, 32, torch.bfloat16)],
    ids=str,
)
def test_semi_sparse(shape):
    check(*shape, torch.device("cuda", 0), kind="semi_sparse")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("shape", ARRANGEMENTS, ids=str)
def test_arrangements_of_semi_sparse(shape):
    check_arrangement(4, *shape, torch.device("cuda", 0), kind="semi_sparse")
