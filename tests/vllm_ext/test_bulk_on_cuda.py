"""What multiplies weights on CUDA, and what is said of those that no kernel there takes; the device is a fake one."""

import logging
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("vllm")

from vllm import logger as vllm_logger
from vllm.config import VllmConfig, set_current_vllm_config

from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.form import Form
from quant_methods.formats.parts.bitmap_codes import BitmapForm
from quant_methods.formats.parts.columns import ColumnsForm
from quant_methods.formats.parts.part import BulkForm
from quant_methods.formats.parts.semi_sparse import SemiSparseForm
from quant_methods.formats.parts.trellis_codes import TrellisForm
from quant_methods.kernels import low_bit_cuda, low_bit_matrix
from quant_methods.kernels.low_bit import LowBitLinear
from quant_methods.kernels.low_bit_cuda import LowBitCUDA
from tests.kv_cache.cuda.emulator import EmulatedKernel
from tests.quant_methods.random_layers import random_layer
from vllm_ext import bulk, served_linear
from vllm_ext.served_linear import serve


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What loading layers on a CUDA device says; codes on the CPU count as codes there."""
    monkeypatch.setattr(served_linear, "device_of", lambda linear: torch.device("cuda"))
    monkeypatch.setattr(low_bit_matrix, "load_kernel", EmulatedKernel)
    monkeypatch.setattr(low_bit_matrix, "device_limits", lambda device: (3, 227 << 10, True))
    monkeypatch.setattr(low_bit_cuda.LowBitCUDA, "prepare", lambda self: None)
    caches = low_bit_matrix._arrivals, low_bit_matrix._arrangement, vllm_logger._print_warning_once
    for cache in caches:
        cache.cache_clear()
    handler = Lines()
    bulk.logger.addHandler(handler)
    with set_current_vllm_config(VllmConfig()):
        yield handler.lines
    bulk.logger.removeHandler(handler)
    for cache in caches:
        cache.cache_clear()


def load(form: Form, layers: int = 3) -> list[torch.nn.Module]:
    """A model's layers, of one format and different shapes, as serving has them."""
    found = []
    for index in range(layers):
        linear = random_layer(form, 64 + 32 * index, 128, index)
        found += [served.bulk.linear for served in serve([linear], [form.activations], torch.bfloat16)]
    return found


@pytest.mark.parametrize(
    ("form", "what", "instead"),
    [
        (
            flat_form(8, 64, symmetric=False),
            "8-bit weights with zero-points have no CUDA kernel",
            "compress with --symmetric",
        ),
        (
            flat_form(8, symmetric=False, activations="int8"),
            "8-bit weights with zero-points have no",
            "with --symmetric",
        ),
        (flat_form(5, table=True), "5-bit look-up weights have no CUDA kernel", "tables of 3 or 4 bits"),
        (flat_form(7, table=True), "7-bit look-up weights have no CUDA kernel", "round to a grid"),
        (flat_form(3, 16), "3-bit weights of this layout have no CUDA kernel", "in groups of 32, 64 or 128 channels"),
        (
            Form((TrellisForm(3, 16),)),
            "3-bit trellis codes in groups of 16 have no CUDA kernel",
            "use groups of 32, 64 or 128",
        ),
        (
            Form((SemiSparseForm(4, 16),)),
            "4-bit 2:4 codes in groups of 16 have no CUDA kernel",
            "use groups of 32, 64 or 128",
        ),
        (
            Form((BitmapForm(4, 8),)),
            "4-bit codes with a bitmap in groups of 8 have no CUDA kernel",
            "use groups of 32, 64 or 128",
        ),
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_said_once(log: list[str], form: Form, what: str, instead: str) -> None:
    assert all(isinstance(layer, LowBitLinear) for layer in load(form))
    (line,) = log
    assert what in line
    assert "expands them to 16 bits at every step, which takes longer than 16-bit weights do" in line
    assert instead in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "form",
    [
        *(flat_form(bits, table=True) for bits in (2, 3, 4)),
        flat_form(6, 64, symmetric=False),
        *(Form((TrellisForm(bits, size),)) for bits, size in ((2, -1), (3, 32), (4, 64))),
        *(Form((SemiSparseForm(4, size, size > 0),)) for size in (-1, 32, 128)),
        *(Form((BitmapForm(4, size, symmetric=size == 64),)) for size in (-1, 32, 64)),
    ],
    ids=str,
)
def test_of_what_a_kernel_takes_nothing_is_said(log: list[str], form: Form) -> None:
    assert all(isinstance(layer, LowBitCUDA) for layer in load(form))
    assert log == []


@pytest.mark.parametrize(
    "bulk",
    [TrellisForm(3, 64), SemiSparseForm(4, 64, symmetric=False), BitmapForm(4, 64, symmetric=False)],
    ids=str,
)
def test_what_a_model_multiplies_by_codes_is_their_weight(log: list[str], bulk: BulkForm) -> None:
    form = Form((bulk, ColumnsForm(3)))
    linear = random_layer(form, 64, 128, 0)
    (layer,) = serve([linear], [form.activations], torch.bfloat16)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    expected = x.double() @ linear.read().double().T
    assert (layer(x).double() - expected).norm() < 8e-3 * expected.norm()
