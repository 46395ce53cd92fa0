"""A layer's parts add up to its weight."""

import torch

from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.quantized import QuantizedLinear


def test_parts_add_up():
    codes = torch.tensor([[1, -2, 3, 0], [0, 7, -8, 2]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5], [2.0]]), torch.tensor([[1], [0]], dtype=torch.int8)
    bulk = GridCodes(codes, scale, zero, bits=4)
    grid = torch.tensor([[0.0, -1.5, 1.0, -0.5], [0.0, 14.0, -16.0, 4.0]])
    assert torch.equal(QuantizedLinear(bulk).read(), grid)

    columns = Columns(
        torch.tensor([1], dtype=torch.int32), torch.tensor([[4], [-6]], dtype=torch.int8), torch.ones(2) / 4
    )
    expected = grid.clone()
    expected[:, 1] = torch.tensor([1.0, -1.5])
    assert torch.equal(QuantizedLinear(bulk, columns).read(), expected)

    sparse = Sparse(torch.tensor([0, 2, 3]), torch.tensor([0, 3, 2]), torch.tensor([10.0, 20.0, 30.0]))
    low_rank = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    expected += torch.tensor([[11.0, 0.0, 1.0, 20.0], [2.0, 0.0, 32.0, 0.0]])
    assert torch.equal(QuantizedLinear(low_rank, bulk, sparse, columns).read(), expected)


def test_a_table_gives_its_row_s_values():
    table = torch.tensor([[0.0, 1.0, 2.0, 4.0], [-1.0, -2.0, -3.0, -5.0]], dtype=torch.bfloat16)
    codes = torch.tensor([[3, 0, 1], [2, 3, 3]], dtype=torch.int8)
    linear = QuantizedLinear(TableCodes(codes, table)).cpu()
    assert torch.equal(linear.read(), torch.tensor([[4.0, 0.0, 1.0], [-3.0, -5.0, -5.0]]))
