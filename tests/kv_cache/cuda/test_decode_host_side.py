"""What of decode attention runs without a device: tuning, tables, and compilation for devices that are not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kv_cache.cuda import decode
from kv_cache.cuda.decode import DecodeAttention
from kv_cache.cuda.folding import Folding, PositionTables
from kv_cache.cuda.launch import SOURCES
from kv_cache.cuda.runtime import nvrtc
from kv_cache.cuda.tuning import choose, query_steps
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS
from kv_cache.layout import PageLayout
from kv_cache.rotary import SPAN, Rotary
from tests.kv_cache.cuda.devices import SHARED
from tests.kv_cache.cuda.random_batch import MIXED, Batch, format_of, served
from tests.kv_cache.random_scales import random_scales

NAMES = (*FORMATS, *MIXED)


@pytest.mark.parametrize(("name", "dim"), served(NAMES))
@pytest.mark.parametrize("capability", SHARED, ids=str)
def test_tuning_fits_every_device(name, dim, capability):
    layout = PageLayout(format_of(name), dim, 16)
    for rows in (1, 8, 9, 20, 256):
        tuning = choose(layout, rows, capability, SHARED[capability])
        assert tuning.shared_bytes(layout) <= SHARED[capability]
        assert tuning.bulk_copy == (capability >= (9, 0))
        assert SPAN % (tuning.units * 16) == 0


@pytest.mark.parametrize(("name", "dim"), served(NAMES))
def test_query_steps_cover_the_head(name, dim):
    steps = query_steps(PageLayout(format_of(name), dim, 16))
    assert dim <= 16 * steps < 2 * dim


@pytest.mark.parametrize(("rotated", "interleaved"), [(40, True), (40, False), (32, False), (0, False)])
def test_position_tables(rotated, interleaved):
    dim = 80
    rotary = Rotary.over(dim, torch.rand(rotated), 3 * SPAN + 5, interleaved)
    table = rotary.table(3 * SPAN + 5)
    tables = PositionTables.of(table, torch.device("cpu"))
    assert (tables.rotated, tables.interleaved) == (rotated, interleaved)
    assert torch.equal(tables.far, torch.cat([table.anchor_cos, table.anchor_sin], 1))
    # What the tensor cores multiply is the table, times 127 * 2**-24, in the order of their operands.
    near = torch.cat([table.read(table.cos_codes), table.read(table.sin_codes)], 1)
    operands = tables.operands.view(torch.float16).float() * 2.0**24 / 127
    for unit, step, g, t in ((0, 0, 0, 0), (15, dim // 16 - 1, 7, 3), (6, 1, 3, 2)):
        for upper in (0, 1):
            for late in (0, 1):
                channel, token = 16 * step + 4 * t + 2 * upper, 16 * unit + 8 * late + g // 2 + 4 * (g % 2)
                assert torch.allclose(operands[unit, step, g, t, upper, late], near[token, channel : channel + 2])


def test_layers_share_position_tables():
    scales = random_scales(2, 64)
    first, second = (Folding.of(scales.heads(i, i + 1), 1000, torch.device("cpu")) for i in range(2))
    assert first.positions is second.positions


# Formats that have a name for every device, other widths for both ways of copying, and the rest for a device each.
COMPILED = [(name, 128, 4, capability) for name in FORMATS for capability in SHARED]
COMPILED += [(name, 128, 4, capability) for name in MIXED for capability in ((8, 0), (9, 0))]
SIZES = [(64, 4), (80, 4), (96, 4), (256, 4), (128, 16), (128, 32)]
COMPILED += [("int4_per_head", *size, capability) for size, capability in zip(SIZES, 2 * list(SHARED), strict=False)]


@pytest.mark.parametrize(("name", "dim", "rows", "capability"), COMPILED, ids=str)
def test_kernels_compile(name, dim, rows, capability, monkeypatch):
    """As the host asks for them, so the host's structures of parameters have the kernels' size too."""
    compiled = []

    def load_kernel(source, kernel, macros, device, shared_bytes=0):
        assert nvrtc.compile_cubin(source, f"sm_{capability[0]}{capability[1]}", tuple(macros), SOURCES)
        assert shared_bytes <= SHARED[capability]
        compiled.append(source)
        return SimpleNamespace(blocks_per_multiprocessor=lambda threads: 1)

    properties = SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=SHARED[capability])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(decode, "cuda_device", lambda layout, device: (device, capability))
    monkeypatch.setattr(decode, "load_kernel", load_kernel)
    layout = PageLayout(format_of(name), dim, 16 if dim == 128 else 32)
    DecodeAttention(layout, 2, 2 * rows, torch.bfloat16, torch.device("cpu"), 1, 1)
    assert compiled == ["decode.cu", "prepare.cu"]


def test_scales_of_other_heads_are_refused(monkeypatch):
    monkeypatch.setattr(decode, "cuda_device", lambda layout, device: (device, (9, 0)))
    monkeypatch.setattr(
        decode, "load_kernel", lambda *args: SimpleNamespace(blocks_per_multiprocessor=lambda threads: 1)
    )
    properties = SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=SHARED[9, 0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    batch = Batch.make("int4_per_head", [5], [1], device="cpu", kv_heads=2)
    batch.folding = Folding.of(batch.scales.heads(0, 1), 5, torch.device("cpu"))
    with pytest.raises(ParetoError, match="scales of 2 KV heads of 128"):
        batch.run()
