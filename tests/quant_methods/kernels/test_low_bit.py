"""The reference of the low-bit kernel multiplies by what the layer's bulk reads back as."""

import pytest
import torch

from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.form import Form
from quant_methods.kernels import low_bit
from quant_methods.kernels.low_bit import LowBitLinear
from tests.quant_methods.random_layers import random_layer

GRIDS = [
    flat_form(bits, group, symmetric=symmetric)
    for bits in range(2, 9)
    for group in (-1, 32)
    for symmetric in (True, False)
]
TABLES = [flat_form(bits, table=True) for bits in range(2, 8)]


@pytest.mark.parametrize("form", GRIDS + TABLES, ids=str)
def test_weights_are_the_bulk_rounded_once(form: Form) -> None:
    linear = random_layer(form, 37, 96)
    kernel = LowBitLinear(linear.bulk, torch.bfloat16)
    assert kernel.bits == form.bulk.bits
    assert torch.equal(kernel.weight(0, 37), linear.read_bulk().bfloat16())
    assert torch.equal(kernel.weight(30, 37), linear.read_bulk()[30:].bfloat16())


@pytest.mark.parametrize("form", [flat_form(3, 32, symmetric=False), flat_form(4, table=True)], ids=str)
def test_products(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "ROWS_AT_ONCE", 16)
    linear = random_layer(form, 40, 64)
    kernel = LowBitLinear(linear.bulk, torch.float16)
    x = torch.randn(2, 3, 64, dtype=torch.float16)
    expected = x.double() @ linear.read_bulk().double().T
    assert torch.allclose(kernel.apply(x).double(), expected, atol=2e-3)
    assert kernel.apply(x).shape == (2, 3, 40)


def test_planes_stay_packed() -> None:
    linear = random_layer(flat_form(3, 128), 64, 256)
    kernel = LowBitLinear(linear.bulk, torch.bfloat16)
    planes = sum(buffer.numel() * 4 for name, buffer in kernel.named_buffers() if name.startswith("plane"))
    assert planes == 64 * 256 * 3 // 8
