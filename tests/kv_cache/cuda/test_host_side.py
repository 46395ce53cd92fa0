"""What of the CUDA kernels runs without a device: tuning, tables, and compilation where NVRTC is installed."""

from __future__ import annotations

import pytest
import torch
from kv_cache.cuda.sides import make_side

from kv_cache import reference
from kv_cache.cuda import nvrtc, read, store
from kv_cache.cuda.decode import DecodeAttention
from kv_cache.cuda.folding import PositionTables
from kv_cache.cuda.tuning import choose, query_steps
from kv_cache.errors import ParetoError
from kv_cache.formats import HEAD_SIZES, get_format
from kv_cache.layout import PageLayout
from kv_cache.rotary import SPAN, Rotary
from tests.kv_cache.cuda.random_batch import Batch, relative_error
from tests.kv_cache.random_scales import CODINGS, coding, random_scales

STATIC = ("int4_per_head", "int6_per_head", "int8_per_head", "k8v4_per_head")
SHARED = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
"""Shared memory that a thread block may have (CUDA C++ Programming Guide, compute capabilities)."""


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("capability", SHARED)
def test_tuning_fits_every_device(name, dim, capability):
    layout = PageLayout(get_format(name), dim, 16)
    for rows in (1, 8, 9, 20, 256):
        tuning = choose(layout, rows, capability, SHARED[capability])
        assert tuning.shared_bytes(layout, query_steps(layout)) <= SHARED[capability]
        assert tuning.rows >= min(rows, 16)
        assert tuning.bulk_copy == (capability >= (9, 0))
        assert SPAN % (tuning.units * 16) == 0


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_query_steps_cover_the_head(name, dim):
    steps = query_steps(PageLayout(get_format(name), dim, 16))
    assert dim <= 16 * steps < 2 * dim


@pytest.mark.parametrize("pairs", [32, 40])
def test_position_tables(pairs):
    dim = 80
    table = Rotary(torch.rand(pairs), 3 * SPAN + 5).table(3 * SPAN + 5)
    tables = PositionTables.of(table, dim, torch.device("cpu"))
    assert (tables.pairs, tables.interleaved) == (pairs, False)
    near, far = torch.zeros(SPAN, 2, dim // 2), torch.zeros(4, 2, dim // 2)
    near[:, 0, :pairs], near[:, 1, :pairs] = table.read(table.cos_codes), table.read(table.sin_codes)
    far[:, 0, :pairs], far[:, 1, :pairs] = table.anchor_cos, table.anchor_sin
    assert torch.equal(tables.far, far.flatten(1))
    # What the tensor cores multiply is the same, times 127 * 2**-24, in the order of their operands.
    near, operands = near.flatten(1), tables.operands.view(torch.float16).float() * 2.0**24 / 127
    for unit, step, g, t in ((0, 0, 0, 0), (15, dim // 16 - 1, 7, 3), (6, 1, 3, 2)):
        for upper in (0, 1):
            for late in (0, 1):
                channel = 16 * step + 4 * t + 2 * upper
                want = near[16 * unit + 8 * late + g, channel : channel + 2]
                assert torch.allclose(operands[unit, step, g, t, upper, late], want)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [80, 96])  # Interleaved pairs, and pairs of part of the channels.
@pytest.mark.parametrize("name", CODINGS)
def test_the_float64_attention_of_these_tests_is_the_specification(name, dim, one_thread):
    fmt, _ = coding(name)
    if not fmt.static:
        pytest.skip("scales inside the page")
    scales = random_scales(name, 2, dim)
    more = {"dim": dim, "device": "cpu", "scales": scales, "block": 272, "window": 200, "soft_cap": 30.0}
    batch = Batch.make(fmt.name, [270, 3], [2, 3], group=2, padded=True, **more)
    lens, start = batch.indices()
    want = reference.paged_attention(
        batch.query, batch.cache, batch.table, lens, start, batch.layout, scales, batch.scale, 200, 30.0
    )
    assert relative_error(batch.want(), want) < 1e-5  # The specification turns means in float32.


def test_group_formats_are_refused():
    layout = PageLayout(get_format("int8_per_group"), 128, 16)
    with pytest.raises(ParetoError, match="inside the page"):
        DecodeAttention(layout, 2, 8, torch.float16, torch.device("cuda"), 1, 1)


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize(
    ("name", "dim"),
    [*((name, 128) for name in CODINGS), *(("int4_per_head+centred", dim) for dim in (64, 80, 96, 256))],
)
def test_store_and_read_compile_and_fit(name, dim, capability, monkeypatch):
    """Everything that a layer launches is loaded ahead, for devices that are not there."""
    loaded = []

    def load_kernel(source, kernel, macros, device, shared_bytes=0, one_block=False):
        assert nvrtc.compile_cubin(source, f"sm_{capability[0]}{capability[1]}", tuple(macros))
        assert shared_bytes <= SHARED[capability]
        loaded.append(source)

    layout, scales = PageLayout(coding(name)[0], dim, 16), random_scales(name, 2, dim)
    device = torch.device("cpu")
    sides = make_side("key", layout, 2, scales, device), make_side("value", layout, 2, scales, device)
    for module in (store, read):
        monkeypatch.setattr(module, "load_kernel", load_kernel)
        monkeypatch.setattr(module, "device_limits", lambda device: (132, SHARED[capability], capability >= (9, 0)))
        module.preload(layout, sides, torch.bfloat16, device)
    tiled = layout.fmt.static and (dim <= 128 or "+" not in name)
    assert loaded[:2] == (["store_tiles.cu"] if tiled else ["store.cu"]) * 2
    assert set(loaded[2:]) == ({"read_tiles.cu"} if tiled and dim != 80 else {"read.cu"})


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("name", STATIC)
def test_kernels_compile(arch, name):
    layout = PageLayout(get_format(name), 128, 16)
    capability = (int(arch[3]), int(arch[4]))
    tuning = choose(layout, 8, capability, SHARED[capability])
    page = (("HEAD_DIM", 128), ("KEY_BITS", layout.fmt.key_bits), ("VALUE_BITS", layout.fmt.value_bits))
    flags = (("BLOCK_SIZE", 16), ("SOFT_CAP", 0), ("BIAS", 1), ("OUT_BFLOAT", 1))
    assert nvrtc.compile_cubin("decode.cu", arch, (*page, *flags, *tuning.macros()))
    assert nvrtc.compile_cubin(
        "prepare.cu", arch, (*page, ("IN_BFLOAT", 1), ("DENSE", 1), ("BIAS", 1), ("BULK_COPY", 0))
    )
