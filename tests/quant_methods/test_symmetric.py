"""Products with symmetric matrices against plain ones in float64, also of sizes that strips do not divide."""

import pytest
import torch

from quant_methods.symmetric import add_square, mean_square, mirror


@pytest.mark.parametrize("size", [7, 128, 300, 1100])
def test_half_of_a_product_is_as_good_as_all(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, other = (torch.randn(60, size, generator=generator) for _ in range(2))
    total = torch.zeros(size, size)
    add_square(total, x)
    add_square(total, other)
    expected = x.double().T @ x.double() + other.double().T @ other.double()
    assert torch.allclose(mirror(total).double(), expected, atol=1e-4)
    assert torch.equal(total, total.T)
    matrix = torch.randn(5, size, generator=generator)
    wanted = (
        (x.double() @ matrix.double().T).square().sum() + (other.double() @ matrix.double().T).square().sum()
    ).item()
    assert mean_square(matrix, total) == pytest.approx(wanted, rel=1e-5)
