"""The low-bit kernel on codes with a bitmap, against the weight that they mean: on a GPU, and its source on a CPU."""

import pytest
import torch

from kv_cache.cuda.runtime import nvrtc
from kv_cache.errors import ParetoError
from quant_methods.formats.parts.bitmap_codes import BitmapCodes
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.kernels import low_bit_matrix
from quant_methods.kernels.low_bit import LowBitLinear
from quant_methods.kernels.low_bit_cuda import LowBitCUDA, low_bit_module
from quant_methods.kernels.low_bit_layout import pack_bitmap
from quant_methods.kernels.low_bit_matrix import PackedMatrix
from tests.kv_cache.cuda.devices import SHARED
from tests.quant_methods.kernels.test_low_bit_cuda import (
    ARRANGEMENTS,
    BESIDE,
    CPU,
    check,
    check_arrangement,
    check_with_beside,
    gpu,
    random_layer,
)

SHAPES = [
    # rows, channels, group size, columns, dtype
    (40, 256, 128, 1, torch.bfloat16),
    (16, 160, 32, 5, torch.float16),
    (33, 128, 64, 9, torch.bfloat16),
    (64, 384, -1, 17, torch.bfloat16),
    (24, 224, -1, 3, torch.float16),
    (16, 1280, 128, 33, torch.bfloat16),
    (50, 1152, 384, 70, torch.float16),  # Groups that the kernel has three for.
    (100, 256, 128, 140, torch.bfloat16),
    (50, 32, -1, 140, torch.float16),
]


@pytest.mark.parametrize(
    "shape", [*SHAPES[::2], *(pytest.param(one, marks=pytest.mark.long) for one in SHAPES[1::2])], ids=str
)
def test_emulated_products(shape, emulated):
    check(4, *shape, emulated, kind="bitmap")


@pytest.mark.parametrize("shape", [one for one in ARRANGEMENTS if one[3].units == 1], ids=str)
def test_emulated_arrangements(shape, emulated):
    rows, channels, *others = shape
    # A bitmap's channels are multiples of 32.
    check_arrangement(4, rows, channels // 32 * 32, *others, emulated, kind="bitmap")


@pytest.mark.parametrize("tokens", [1, pytest.param(140, marks=pytest.mark.long), 70])
def test_emulated_with_what_lies_beside(tokens, emulated):
    check_with_beside(tokens, *BESIDE[-1], emulated, kind="bitmap")
    check_with_beside(tokens, *BESIDE[1], emulated, kind="bitmap", rows=500, channels=1024)


def blocks_of_all_kinds(device, dtype, unit):
    """Blocks of 32 rows by 128 channels: empty, full, one code, all but one; and every byte of a bitmap."""
    generator = torch.Generator().manual_seed(7)
    rows, channels = 128, 512
    kept = torch.zeros(rows, channels, dtype=torch.bool)
    kept[:32, 128:256] = True
    kept[5, 300] = True
    kept[:32, 384:] = True
    kept[31, 511] = False
    kept[32:] = torch.rand(96, channels, generator=generator) < 0.5
    every = torch.arange(256)[:, None] >> torch.arange(8) & 1
    kept[32:64] = every.bool().flatten().repeat(8).view(32, channels)
    groups = channels // 128
    zero = torch.randint(-8, 8, (rows, groups), generator=generator, dtype=torch.int8)
    spread = zero.repeat_interleave(128, 1)
    codes = torch.randint(-8, 8, (rows, channels), generator=generator, dtype=torch.int8)
    codes = torch.where(kept, torch.where(codes == spread, spread ^ 1, codes), spread)
    scale = torch.ones(rows, groups) if unit else torch.rand(rows, groups, generator=generator) + 0.5
    part = BitmapCodes.of(GridCodes(codes, scale.to(dtype), zero, 4))
    lines = part.starts.diff().tolist()[:4]
    assert lines == [0, 128, 1, 128], "a block has no codes or all"
    return part.to(device)


def check_every_byte(dtype, device):
    """Without scales weights are small whole numbers: they are exact to the last bit."""
    part = blocks_of_all_kinds(device, dtype, unit=True)
    assert torch.equal(LowBitCUDA(part, dtype).weight().float(), part.read())
    # Products with unit vectors are the weights, too, now through shared memory.
    matrix = LowBitCUDA(part, dtype)
    found = torch.cat([matrix.apply(x) for x in torch.eye(512, dtype=dtype, device=device).split(40)])
    assert torch.equal(found.T.float(), part.read())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_byte_of_a_bitmap_is_decoded_exactly(dtype, emulated):
    check_every_byte(dtype, emulated)


@pytest.mark.parametrize("zeros", [0.0, 1.0])
def test_a_layer_without_zeros_and_one_of_zeros_alone(zeros, emulated):
    layer = random_layer(4, 70, 288, 32, torch.bfloat16, emulated).to(emulated)
    spread = layer.zero_point.repeat_interleave(32, 1)
    codes = torch.where(layer.codes == spread, spread ^ 1, layer.codes) if not zeros else spread
    part = BitmapCodes.of(GridCodes(codes, layer.scale, layer.zero_point, 4))
    x = torch.randn(3, 288, dtype=torch.bfloat16)
    expected = x.double() @ part.read().double().T
    found = LowBitCUDA(part, torch.bfloat16).apply(x).double()
    size = x.double().abs() @ part.read().double().abs().T
    assert ((found - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * size).all()
    assert (found == 0).all() == (zeros == 1.0)


def test_words_of_a_bitmap_change_places():
    words = torch.arange(2 * 5 * 32, dtype=torch.int32).reshape(2, 5, 32) + 1
    packed = pack_bitmap(words)
    assert packed.shape == (2, 2, 128)
    for tile, step, lane in ((0, 0, 0), (0, 3, 7), (1, 4, 31), (1, 2, 30)):
        assert packed[tile, step // 4, 4 * lane + step % 4] == words[tile, step, lane]
    assert (packed != 0).sum() == words.numel()


def test_malformed_bitmaps_are_refused(emulated):
    part = random_layer(4, 64, 256, 64, torch.bfloat16, emulated, kind="bitmap")
    fields = {name: getattr(part, name) for name in ("bitmap", "kept", "starts", "scale", "zero_point")}
    for name, wrong in (("bitmap", part.bitmap.long()), ("bitmap", part.bitmap[:1]), ("kept", part.kept.long()),
                        ("starts", part.starts[:-1]), ("scale", part.scale.to("meta"))):  # fmt: skip
        with pytest.raises(ParetoError, match="the low-bit kernel expects"):
            low_bit_module(BitmapCodes(**(fields | {name: wrong})), torch.bfloat16)
    with pytest.raises(ParetoError, match="serves codes with a bitmap of 4 bits, 16-bit activations"):
        LowBitCUDA(part, torch.float32)


def test_the_door_of_the_kernel(emulated):
    matrix = LowBitCUDA(random_layer(4, 64, 256, 64, torch.bfloat16, emulated, kind="bitmap"), torch.bfloat16).matrix()
    x, y = torch.zeros(2, 256, dtype=torch.bfloat16), torch.zeros(2, 64, dtype=torch.bfloat16)
    common = matrix.words, matrix.side, "bitmap", 64, 256, 4, 4
    for kept, starts in ((None, matrix.starts), (matrix.kept, None), (matrix.kept.long(), matrix.starts),
                         (matrix.kept[:, :2], matrix.starts), (matrix.kept, matrix.starts.long()),
                         (matrix.kept, matrix.starts[1:]), (matrix.kept.to("meta"), matrix.starts)):  # fmt: skip
        with pytest.raises(ParetoError, match="the low-bit kernel expects"):
            PackedMatrix(*common, kept, starts, matrix.most_lines).multiply(x, y)
    grid = LowBitCUDA(random_layer(4, 64, 256, 64, torch.bfloat16, emulated), torch.bfloat16).matrix()
    too_much = PackedMatrix(grid.words, grid.side, "grid", 64, 256, 4, 4, matrix.kept, matrix.starts)
    with pytest.raises(ParetoError, match="codes and their starts with a bitmap alone"):
        too_much.multiply(x, y)


def test_groups_that_no_kernel_serves_run_in_pytorch(emulated):
    layer = random_layer(4, 1100, 96, 24, torch.bfloat16, emulated, kind="bitmap")
    with pytest.raises(ParetoError, match="groups of which 32 divides the channels, not of 24"):
        LowBitCUDA(layer, torch.bfloat16)
    module = low_bit_module(layer, torch.bfloat16)
    assert isinstance(module, LowBitLinear)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    expected = x.double() @ layer.read().to(torch.bfloat16).double().T
    assert ((module.apply(x).double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, *(pytest.param(tokens, marks=pytest.mark.long) for tokens in (8, 16, 32))])
def test_what_is_chosen_compiles_and_fits(tokens, capability, emulated, monkeypatch):
    """For devices that are not there, and blocks without zeros, whose codes take the most room."""
    monkeypatch.setattr(low_bit_matrix, "device_limits", lambda device: (132, SHARED[capability], capability >= (9, 0)))
    matrix = LowBitCUDA(blocks_of_all_kinds(CPU, torch.bfloat16, unit=False), torch.bfloat16).matrix()
    assert matrix.code_bytes == 2048
    for rows in (64, 4096, 28672):
        layout = matrix.unit_bits, matrix.side_bytes
        chosen = low_bit_matrix._arrangement(rows // 32, 32, *layout, tokens, CPU, matrix.table_bytes, "bitmap")
        assert chosen.blocks * matrix.shared_bytes(chosen, tokens) <= SHARED[capability]
    macros = matrix.macros(torch.bfloat16, tokens, matrix.arrangement(tokens))
    assert nvrtc.compile_cubin("low_bit.cu", f"sm_{capability[0]}{capability[1]}", macros, low_bit_matrix.FOLDER)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [*SHAPES, (4096, 4096, 128, 8, torch.bfloat16), (500, 14336, 64, 32, torch.bfloat16)], ids=str
)
def test_products(shape):
    check(4, *shape, torch.device("cuda", 0), kind="bitmap")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [one for one in ARRANGEMENTS if one[3].units == 1], ids=str)
def test_arrangements(shape):
    rows, channels, *others = shape
    check_arrangement(4, rows, channels // 32 * 32, *others, torch.device("cuda", 0), kind="bitmap")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_byte_is_decoded_exactly_on_a_device(dtype):
    check_every_byte(dtype, torch.device("cuda", 0))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 17, 32, 64, 70, 140, 300])
@pytest.mark.parametrize("parts", BESIDE, ids=str)
def test_with_what_lies_beside(tokens, parts):
    device = torch.device("cuda", 0)
    check_with_beside(tokens, *parts, device, kind="bitmap")
    check_with_beside(tokens, *parts, device, kind="bitmap", rows=4100, channels=2048)
