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
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)]).int()
    x = torch.randn(tokens, 24, generator=generator)
    y = sparse_linear(x, starts, dense.nonzero()[:, 1].int(), dense[dense != 0])
    assert torch.allclose(y, x @ dense.T, atol=1e-4)
