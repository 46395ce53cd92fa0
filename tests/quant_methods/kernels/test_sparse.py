"""Products with a sparse part, for few tokens and for many, are those of the dense matrix."""

import pytest
import torch

from quant_methods.kernels import sparse
from quant_methods.kernels.sparse import FEW_TOKENS, sparse_linear


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1, 70])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_products_are_the_dense_ones(tokens: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "ROWS_AT_ONCE", 16)
    generator = torch.Generator().manual_seed(tokens)
    dense = torch.randn(43, 24, generator=generator) * (torch.rand(43, 24, generator=generator) < share)
    rows, columns = dense.nonzero(as_tuple=True)
    x = torch.randn(tokens, 24, generator=generator)
    y = sparse_linear(x, rows, columns, dense[rows, columns], 43)
    assert torch.allclose(y, x @ dense.T, atol=1e-4)


def test_it_is_an_operator_that_compilers_can_trace() -> None:
    arguments = (torch.randn(3, 8), torch.tensor([0, 2]), torch.tensor([7, 1]), torch.randn(2), 5)
    torch.library.opcheck(sparse_linear, arguments)
