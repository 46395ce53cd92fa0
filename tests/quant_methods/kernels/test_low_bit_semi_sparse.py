"""The low-bit kernel's sparse variant against the weight that 2:4 codes mean: on a GPU, and its source on a CPU."""

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.part import Draw
from quant_methods.formats.parts.semi_sparse import SemiSparseForm
from quant_methods.kernels.low_bit import LowBitLinear
from quant_methods.kernels.low_bit_cuda import LowBitCUDA, low_bit_module
from quant_methods.kernels.low_bit_layout import pack_semi_sparse
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
