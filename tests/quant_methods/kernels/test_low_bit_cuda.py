"""The low-bit kernel against the weight that a quantized layer means: on a GPU, and its source on a CPU."""

import pytest
import torch

from kv_cache.cuda.runtime import nvrtc
from kv_cache.errors import ParetoError
from quant_methods.formats.parts.bitmap_codes import BitmapCodes
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.semi_sparse import NIBBLES, SemiSparseCodes
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.parts.trellis import pair_values, states_of
from quant_methods.formats.parts.trellis_codes import TrellisCodes
from quant_methods.kernels import low_bit_cuda, low_bit_matrix
from quant_methods.kernels.low_bit import LowBitLinear
from quant_methods.kernels.low_bit_cuda import LowBitCUDA, low_bit_module
from quant_methods.kernels.low_bit_layout import pack, pack_trellis
from quant_methods.kernels.low_bit_matrix import Arrangement
from tests.kv_cache.cuda.devices import SHARED
from tests.quant_methods.kernels.graphs import check_layers_in_a_graph
from tests.quant_methods.kernels.test_beside import apart
from tests.quant_methods.kernels.test_beside import expected as expected_beside
from tests.quant_methods.kernels.test_beside import make as make_beside

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [
    # bits, rows, channels, group size, columns, dtype
    (3, 40, 256, 128, 1, torch.bfloat16),
    (2, 16, 160, 32, 5, torch.float16),
    (5, 33, 128, 64, 9, torch.bfloat16),
    (6, 64, 384, -1, 17, torch.bfloat16),
    (7, 24, 200, -1, 3, torch.float16),
    (4, 16, 1280, 128, 33, torch.bfloat16),
    (3, 50, 1152, 128, 70, torch.float16),
    (3, 50, 256, 128, 140, torch.bfloat16),
]


def random_layer(bits, rows, channels, group_size, dtype, device, kind="grid", seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else channels // group_size
    if kind == "trellis":  # Any words are a stream.
        words = torch.randint(-(1 << 31), 1 << 31, (-(-rows // 32), channels // 8, 8 * bits), generator=generator)
        scale = torch.rand(rows, groups, generator=generator) + 0.5
        return TrellisCodes(words.int(), scale.to(dtype)).to(device)
    low = 0 if kind == "table" else -(1 << (bits - 1))
    kept = channels // 2 if kind == "semi_sparse" else channels
    codes = torch.randint(low, low + (1 << bits), (rows, kept), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.5).to(dtype)
    zero = torch.randint(low, low + (1 << bits), (rows, groups), generator=generator, dtype=torch.int8)
    if kind == "table":
        return TableCodes(codes, torch.randn(rows, 1 << bits, generator=generator).to(dtype)).to(device)
    if kind == "semi_sparse":
        drawn = torch.randint(len(NIBBLES), (rows, channels // 4), generator=generator)
        places = torch.tensor(NIBBLES, dtype=torch.uint8)[drawn]
        return SemiSparseCodes(codes, places, scale, zero, bits).to(device)
    if kind == "bitmap":  # Weights are zero more and more often towards the last rows.
        zeros = torch.rand(rows, channels, generator=generator) < torch.linspace(0, 1, rows)[:, None]
        codes = torch.where(zeros, zero.repeat_interleave(channels // groups, 1), codes)
        return BitmapCodes.of(GridCodes(codes, scale, zero, bits)).to(device)
    return GridCodes(codes, scale, zero, bits).to(device)


def check(bits, rows, channels, group_size, columns, dtype, device, kind="grid"):
    layer = random_layer(bits, rows, channels, group_size, dtype, device, kind)
    matrix = LowBitCUDA(layer, dtype)
    # Rows of the activations lie apart, and what is between them is poison.
    storage = torch.full((columns, channels + 8), torch.nan, dtype=dtype, device=device)
    x = storage[:, :channels]
    x.copy_(torch.randn(columns, channels, generator=torch.Generator().manual_seed(1)))
    weight = layer.read().double()
    expected = x.double() @ weight.T
    found = matrix.apply(x[:, None])[:, 0].double()
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    # The result is rounded once; where the weights are expanded for a dense product, they are too.
    size = x.double().abs() @ weight.abs().T
    # Of few weights that are not zero, roundings may all go one way.
    share = 0.5 if kind == "bitmap" else 4 / channels**0.5
    bound = rounding * expected.abs() + 1e-5 * size + (rounding * size * share if columns > 64 else 0)
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= bound).all()
    whole = matrix.weight().double()
    assert ((whole - weight).abs() <= rounding * weight.abs()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_products(shape, emulated):
    check(*shape, emulated)


ARRANGEMENTS = [
    # rows, channels, columns, and how: warps, row warps, stages, blocks, whole, alone, units
    (100, 1160, 1, Arrangement(4, 1, 2, 3, False)),  # A tile of 3 steps between several blocks.
    (100, 1160, 9, Arrangement(4, 2, 3, 2, False)),
    (300, 520, 17, Arrangement(4, 4, 4, 1, True)),
    (200, 1288, 26, Arrangement(2, 1, 3, 1, False)),  # Many tiles a block, some begun elsewhere and some ended.
    (100, 1160, 3, Arrangement(4, 1, 3, 2, False, alone=True)),
    (70, 520, 9, Arrangement(4, 4, 2, 1, True, alone=True)),
    (40, 2056, 2, Arrangement(2, 2, 6, 4, False)),  # One tile between all blocks.
    (100, 1160, 1, Arrangement(4, 1, 2, 3, False, alone=True, units=2)),
    (70, 1400, 9, Arrangement(4, 2, 3, 1, True, units=2)),  # Of the last two units there is one.
]


def check_arrangement(bits, rows, channels, columns, arrangement, device, kind="grid"):
    layer = random_layer(bits, rows, channels, -1, torch.bfloat16, device, kind)
    matrix = LowBitCUDA(layer, torch.bfloat16).matrix()
    # Neither rows of the activations nor of the results are aligned with what is around them, which is poison.
    x = torch.full((columns, channels + 1), torch.nan, dtype=torch.bfloat16, device=device)[:, 1:]
    x.copy_(torch.randn(columns, channels, generator=torch.Generator().manual_seed(1)))
    around = torch.full((columns + 1, rows + 3), torch.nan, dtype=torch.bfloat16, device=device)
    y = around[:columns, 1 : rows + 1]
    weight = layer.read().double()
    for _ in range(3):  # Counts of finished parts are zeros again.
        around.fill_(torch.nan)
        matrix.multiply(x, y, arrangement)
        bound = 2**-8 * (x.double() @ weight.T).abs() + 1e-5 * (x.double().abs() @ weight.abs().T)
        assert ((y.double() - x.double() @ weight.T).abs() <= bound).all()
        assert around.isnan().sum() == around.numel() - y.numel()


@pytest.mark.parametrize(("bits", "shape"), list(zip((3, 2, 5, 7, 6, 3, 4, 3, 4), ARRANGEMENTS, strict=True)), ids=str)
def test_emulated_arrangements(bits, shape, emulated):
    check_arrangement(bits, *shape, emulated, kind="table" if bits == 4 else "grid")


@pytest.mark.parametrize("bits", [3, pytest.param(4, marks=pytest.mark.long)])
def test_emulated_tables(bits, emulated):
    check(bits, 40, 256, -1, 6, torch.bfloat16, emulated, kind="table")
    check(bits, 16, 264, -1, 1, torch.float16, emulated, kind="table")


TRELLIS_SHAPES = [
    # bits, rows, channels, group size, columns, dtype
    (2, 40, 264, -1, 1, torch.bfloat16),
    (3, 32, 160, 32, 9, torch.bfloat16),
    (4, 33, 384, 64, 17, torch.float16),
    (2, 70, 256, 128, 26, torch.float16),
    (3, 64, 512, 256, 64, torch.float16),  # Groups that the kernel has two for.
    (4, 24, 1280, 128, 70, torch.bfloat16),
    (3, 50, 8, -1, 140, torch.bfloat16),
]


@pytest.mark.parametrize("shape", TRELLIS_SHAPES, ids=str)
def test_emulated_trellis(shape, emulated):
    check(*shape, emulated, kind="trellis")


@pytest.mark.parametrize(("bits", "shape"), list(zip((3, 2, 4, 3, 2, 4, 3, 3, 4), ARRANGEMENTS, strict=True)), ids=str)
def test_emulated_arrangements_of_trellis(bits, shape, emulated):
    check_arrangement(bits, *shape, emulated, kind="trellis")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_state_of_a_trellis_is_decoded_exactly(bits, dtype, emulated):
    """Words that go through all states: without scales, weights are the pairs' values to the last bit."""
    layer = random_layer(bits, 512, 1024, -1, dtype, emulated, kind="trellis")
    layer.scale.fill_(1.0)
    assert len(states_of(layer.words, bits).unique()) > 0.98 * len(pair_values())
    assert torch.equal(LowBitCUDA(layer, dtype).weight().float(), layer.read())


def test_words_of_a_trellis_change_places():
    words = torch.arange(2 * 17 * 24, dtype=torch.int32).reshape(2, 17, 24) + 1
    packed = pack_trellis(words)
    assert packed.shape == (2, 2, 384)
    assert torch.equal(packed[packed > 0].sort().values, words.flatten())


def test_malformed_trellis_codes_are_refused(emulated):
    layer = random_layer(3, 64, 256, 64, torch.bfloat16, emulated, kind="trellis")
    for words, scale in ((layer.words.long(), layer.scale), (layer.words[:1], layer.scale),
                         (layer.words, layer.scale.to("meta"))):  # fmt: skip
        with pytest.raises(ParetoError, match="the low-bit kernel expects"):
            low_bit_module(TrellisCodes(words, scale), torch.bfloat16)
    with pytest.raises(ParetoError, match="serves a trellis code of 2 to 4 bits, 16-bit activations"):
        LowBitCUDA(layer, torch.float32)


def test_groups_of_a_trellis_that_no_kernel_serves_run_in_pytorch(emulated):
    layer = random_layer(3, 1100, 48, 24, torch.bfloat16, emulated, kind="trellis")
    with pytest.raises(ParetoError, match="groups of which 32 divides the channels, not of 24"):
        LowBitCUDA(layer, torch.bfloat16)
    module = low_bit_module(layer, torch.bfloat16)
    assert isinstance(module, LowBitLinear)
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    expected = x.double() @ layer.read().to(torch.bfloat16).double().T
    assert ((module.apply(x).double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [*TRELLIS_SHAPES, (3, 4096, 4096, 128, 8, torch.bfloat16), (4, 500, 14336, 64, 32, torch.bfloat16)],
    ids=str,
)
def test_trellis(shape):
    check(*shape, torch.device("cuda", 0), kind="trellis")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", ARRANGEMENTS, ids=str)
def test_arrangements_of_trellis(bits, shape):
    check_arrangement(bits, *shape, torch.device("cuda", 0), kind="trellis")


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, *(pytest.param(tokens, marks=pytest.mark.long) for tokens in (8, 16, 32))])
def test_what_is_chosen_compiles_and_fits(tokens, capability, emulated, monkeypatch):
    """For devices that are not there: every width fits, and one of them compiles."""
    monkeypatch.setattr(low_bit_matrix, "device_limits", lambda device: (132, SHARED[capability], capability >= (9, 0)))
    for bits in range(2, 8):
        for rows, side_bytes in ((64, 128), (4096, 512), (28672, 1024)):
            chosen = low_bit_matrix._arrangement(rows // 32, 32, bits, side_bytes, tokens, CPU, 0, "grid")
            assert chosen.blocks * chosen.shared_bytes(bits, side_bytes, tokens) <= SHARED[capability]
    for kind, bits in (("grid", 3), ("trellis", 3), ("semi_sparse", 4)):
        matrix = LowBitCUDA(random_layer(bits, 32, 128, 128, torch.bfloat16, CPU, kind), torch.bfloat16).matrix()
        macros = matrix.macros(torch.bfloat16, tokens, matrix.arrangement(tokens))
        assert nvrtc.compile_cubin("low_bit.cu", f"sm_{capability[0]}{capability[1]}", macros, low_bit_matrix.FOLDER)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [*SHAPES, (3, 4096, 4096, 128, 8, torch.bfloat16), (6, 500, 14336, 64, 32, torch.bfloat16)], ids=str
)
def test_products(shape):
    check(*shape, torch.device("cuda", 0))


def check_with_beside(tokens, kept, rank, sparse, device, kind="grid", rows=70, channels=256):
    layer = random_layer(4, rows, channels, -1, torch.bfloat16, device, kind)
    matrix = LowBitCUDA(layer, torch.bfloat16)
    beside, added = make_beside(rows, channels, kept, rank, sparse, torch.bfloat16, device)
    x = apart(tokens, channels, dtype=torch.bfloat16, device=device)
    found = matrix.apply(x, beside).double()
    expected = expected_beside(beside, layer.read().double() + added, torch.zeros(1, dtype=x.dtype, device=device), x)
    weight = layer.read().double()
    size = x.double().abs() @ (weight.abs() + added.abs()).T
    # What errors of the weights' size add up to, whose signs are random: in a row with few weights, no less than size.
    spread = (x.double().square() @ (weight.abs() + added.abs()).square().T).sqrt()
    # What a last bit of the low-rank product's first factor changes, which a sum in another order may turn.
    turned = torch.zeros(1, dtype=torch.float64, device=device)
    if rank:
        turned = (x @ beside.down.T).double().abs() @ beside.ends[-rank:].double().abs()
    # The bulk's result is rounded before the rest is added, and the sum; with many tokens the weights, and the sums of
    # parts of the channels, which cuBLAS may then add.
    bound = 2**-8 * (expected.abs() + (x.double() @ weight.T).abs() + turned + 4 * spread) + 1e-5 * size
    assert found.shape == (tokens, rows)
    assert ((found - expected).abs() <= bound).all()
    without = matrix.apply(x).double()
    assert ((without - expected).abs() > bound).any()


BESIDE = [(9, 0, False), (0, 3, False), (0, 0, True), (17, 20, True)]


@pytest.mark.parametrize("tokens", [1, 9, 70, 140])
@pytest.mark.parametrize("parts", BESIDE, ids=str)
def test_emulated_with_what_lies_beside(tokens, parts, emulated, monkeypatch):
    monkeypatch.setattr(low_bit_cuda, "EXPANDED_BYTES", 2 * 256 * 32)  # A tile of rows at once.
    check_with_beside(tokens, *parts, emulated, kind={9: "table", 70: "trellis", 1: "semi_sparse"}.get(tokens, "grid"))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 32, 64, 70, 140, 300])
@pytest.mark.parametrize("parts", BESIDE, ids=str)
def test_with_what_lies_beside(tokens, parts):
    device = torch.device("cuda", 0)
    check_with_beside(
        tokens, *parts, device, kind={8: "semi_sparse", 16: "table", 17: "trellis", 300: "trellis"}.get(tokens, "grid")
    )
    check_with_beside(tokens, *parts, device, rows=4100, channels=2048)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("parts", BESIDE, ids=str)
def test_a_graph_replays_products_that_overlap(parts):
    device, size = torch.device("cuda", 0), 2048
    layer = random_layer(4, size, size, -1, torch.bfloat16, device)
    layer.scale /= 256
    matrix = LowBitCUDA(layer, torch.bfloat16)
    beside, _ = make_beside(size, size, *parts, torch.bfloat16, device)
    for tokens in (1, 8, 32, 64):
        x = torch.randn(tokens, size, device=device, dtype=torch.bfloat16)
        check_layers_in_a_graph(lambda x: matrix.apply(x, beside), x, lambda i: i % 2 == 1)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("shape", ARRANGEMENTS, ids=str)
def test_arrangements(bits, shape):
    check_arrangement(bits, *shape, torch.device("cuda", 0), kind="table" if bits == 4 else "grid")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("columns", [1, 12, 32, 100, 200])
def test_tables(bits, columns):
    check(bits, 300, 4096, -1, columns, torch.bfloat16, torch.device("cuda", 0), kind="table")


@gpu
@pytest.mark.gpu
def test_a_graph_replays_with_other_activations():
    device = torch.device("cuda", 0)
    layer = random_layer(3, 512, 1024, 128, torch.bfloat16, device)
    matrix = LowBitCUDA(layer, torch.bfloat16)
    x = torch.randn(4, 1024, device=device, dtype=torch.bfloat16)
    matrix.apply(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matrix.apply(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, matrix.apply(x))


@pytest.mark.parametrize("bits", range(2, 8))
def test_every_code_has_its_place(bits):
    """Two matrices that differ in one code differ in one word, in as many bits as the codes."""
    codes = torch.randint(0, 1 << bits, (40, 200), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 2, 128 * bits)
    for row, channel in ((0, 0), (39, 199), (17, 131), (8, 64)):
        other = codes.clone()
        other[row, channel] ^= (1 << bits) - 1
        difference = packed ^ pack(other, bits)
        assert sum(bin(word & 0xFFFFFFFF).count("1") for word in difference[difference != 0].tolist()) == bits


@pytest.mark.parametrize(
    ("bits", "channels", "groups", "dtype", "table"),
    [(8, 128, 1, torch.bfloat16, False), (3, 100, 1, torch.bfloat16, False), (3, 128, 1, torch.float32, False),
     (3, 128, 8, torch.bfloat16, False), (2, 128, 1, torch.bfloat16, True)],
)  # fmt: skip
def test_what_the_kernel_does_not_serve_is_refused(bits, channels, groups, dtype, table, emulated):
    codes = torch.zeros(16, channels, dtype=torch.int8)
    scale = torch.ones(16, groups)
    part = TableCodes(codes, torch.zeros(16, 1 << bits)) if table else GridCodes(codes, scale, scale, bits)
    with pytest.raises(ParetoError, match="low-bit kernel serves"):
        LowBitCUDA(part, dtype)


def test_what_the_kernel_does_not_serve_runs_in_pytorch(emulated):
    layer = random_layer(5, 16, 96, -1, torch.bfloat16, emulated, kind="table")
    assert isinstance(low_bit_module(layer, torch.bfloat16), LowBitLinear)
    layer = random_layer(3, 16, 96, 32, torch.bfloat16, emulated)
    assert isinstance(low_bit_module(layer, torch.bfloat16), LowBitCUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_of_2_bits_go_through_the_kernel_of_3(dtype, emulated):
    check_table_of_2_bits(dtype, emulated)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_of_2_bits_do_on_a_device(dtype):
    check_table_of_2_bits(dtype, torch.device("cuda"))


def check_table_of_2_bits(dtype, device):
    layer = random_layer(2, 40, 256, -1, dtype, device, kind="table")
    module = low_bit_module(layer, dtype)
    assert isinstance(module, LowBitCUDA)
    assert torch.equal(module.weight(), layer.read().to(dtype))
    x = torch.randn(3, 256, dtype=dtype, device=device)
    expected = x.double() @ layer.read().double().T
    assert (module.apply(x).double() - expected).norm() < 4e-3 * expected.norm()
