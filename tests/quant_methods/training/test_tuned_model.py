"""Layers in training: what they compute is what would be stored, and gradients reach what learns and nothing else."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant_methods.formats.grid import Grid, round_tokens
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.parts.part import Draw
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.parts.trellis_codes import TrellisCodes, TrellisForm
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.training.tuned_model import Learned, LearnedCodes, TunedLinear, learn_parameter


def layer() -> QuantizedLinear:
    """A grid of [6, 16] with a part of every kind beside it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    return QuantizedLinear(
        GridCodes(
            torch.randint(-8, 8, (6, 16), generator=generator, dtype=torch.int8),
            normal(6, 2).abs() + 0.1,
            torch.randint(-2, 3, (6, 2), generator=generator, dtype=torch.int8),
            bits=4,
        ),
        Columns(torch.tensor([3, 9], dtype=torch.int32), normal(6, 2)),
        Sparse(torch.tensor([0, 1, 1, 2, 2, 2, 2], dtype=torch.int32), torch.tensor([4, 0]).int(), normal(2)),
        LowRank(normal(6, 3), normal(3, 16)),
    )


def test_a_layer_starts_as_it_is_stored_and_computes_what_would_be_stored() -> None:
    linear, x = layer(), torch.randn(5, 16)
    tuned = TunedLinear(linear, None, None)
    assert torch.equal(tuned(x), functional.linear(x, linear.read()))
    assert set(tuned.parts) == {"grid/scale", "columns/weight", "sparse/values", "low_rank/up", "low_rank/down"}
    for learned in tuned.parts.values():
        assert isinstance(learned, Learned)
        nn.init.normal_(learned.offset, std=0.1)
    stored = tuned.stored()
    assert torch.equal(tuned(x), functional.linear(x, stored.read()))
    after, before = (each.part(GridCodes) for each in (stored, linear))
    assert after.scale.dtype == torch.bfloat16
    assert not torch.equal(after.scale, before.scale)
    assert not torch.equal(stored.part(LowRank).up, linear.part(LowRank).up)
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.zero_point, before.zero_point)


def test_of_a_trellis_the_scales_learn_and_the_streams_stay() -> None:
    trellis = TrellisForm(3, 8).random(40, 16, Draw(1.0, torch.bfloat16, torch.device("cpu")))
    x, tuned = torch.randn(5, 16), TunedLinear(QuantizedLinear(trellis), None, None)
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == ["parts.trellis/scale.offset"]
    nn.init.normal_(tuned.parts["trellis/scale"].offset, std=0.1)
    stored, rising = tuned.stored().part(TrellisCodes), torch.randn(5, 40)
    assert torch.equal(stored.words, trellis.words)
    assert not torch.equal(stored.scale, trellis.scale)
    assert torch.equal(tuned(x), functional.linear(x, stored.read()))
    (tuned(x) * rising).sum().backward()
    wanted = ((rising.T @ x) * trellis.pairs()).unflatten(1, (2, 8)).sum(2) * trellis.scale.float().abs().mean(
        1, keepdim=True
    )
    assert torch.allclose(tuned.parts["trellis/scale"].offset.grad, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_parts_alone_and_are_those_of_the_formula() -> None:
    grid, x = layer().part(GridCodes), torch.randn(5, 16)
    linear = QuantizedLinear(grid)
    tuned = TunedLinear(linear, torch.zeros(6), None)
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == ["parts.grid/scale.offset"]
    target = torch.randn(5, 6)
    (0.5 * (tuned(x) - target).square().sum()).backward()
    # W = (code - zero) scale, and the scale moves in units of its row's mean.
    weight_gradient = (functional.linear(x, linear.read()) - target).T @ x
    levels = grid.codes.float() - grid.zero_point.float().repeat_interleave(8, 1)
    by_scale = (weight_gradient * levels).view(6, 2, 8).sum(-1)
    expected = by_scale * grid.scale.float().mean(1, keepdim=True)
    learned = tuned.parts["grid/scale"]
    assert isinstance(learned, Learned)
    assert learned.offset.grad is not None
    assert torch.allclose(learned.offset.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_table_learns_where_its_indices_point() -> None:
    codes = torch.tensor([[0, 1, 1, 3], [2, 2, 2, 2]], dtype=torch.int8)
    table = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    tuned = TunedLinear(QuantizedLinear(TableCodes(codes, table)), None, None)
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    tuned(x).sum().backward()
    learned = tuned.parts["table/table"]
    assert isinstance(learned, Learned)
    assert learned.offset.grad is not None
    unit = 2.5
    expected = unit * torch.tensor([[1.0, 110.0, 0.0, 1000.0], [0.0, 0.0, 1111.0, 0.0]])
    assert torch.equal(learned.offset.grad, expected)


def test_small_steps_add_up_behind_the_rounding() -> None:
    learned = Learned(torch.ones(1, dtype=torch.bfloat16))
    with torch.no_grad():
        for _ in range(20):
            learned.offset += 0.001  # A bfloat16 at 1 moves in steps of 2^-7.
    assert learned.stored().item() == pytest.approx(1.02, abs=2**-8)
    assert learned.stored().item() == learned().item() != 1.02


def test_codes_start_as_they_are_and_flip_past_the_middle() -> None:
    scale, zero = torch.tensor([[0.5]]), torch.tensor([[1]], dtype=torch.int8)
    grid = GridCodes(torch.tensor([[-8, 0, 3, 7]], dtype=torch.int8), scale, zero, bits=4)
    # On the grid, weight / 0.5 + 1: far below its end, at 0.2, at 2.6, which rounds to 3, and above its end.
    codes = LearnedCodes(grid, Grid(4, 4, False), torch.tensor([[-9.0, -0.4, 0.8, 5.0]]))
    assert torch.allclose(codes.offset, torch.tensor([[-0.49, 0.2, -0.4, 0.49]]), atol=1e-6)
    assert torch.equal(codes.stored(), grid.codes)
    with torch.no_grad():
        codes.offset += torch.tensor([[-0.2, 0.29, -0.2, 0.2]])
    assert codes.stored().tolist() == [[-8, 0, 2, 7]]
    assert codes.stored().dtype == torch.int8
    codes().sum().backward()
    assert codes.offset.grad is not None
    assert codes.offset.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]], "held at the ends"
    far = LearnedCodes(grid, Grid(4, 4, False), torch.full((1, 4), 100.0))
    assert torch.equal(far.stored(), grid.codes), "GPTQ rounds away from the nearest code; that is where this starts"


def test_codes_of_pruned_weights_stay_whatever_the_gradient() -> None:
    scale, zero = torch.tensor([[0.5]]), torch.tensor([[1]], dtype=torch.int8)
    grid = GridCodes(torch.tensor([[1, 0, 1, 3]], dtype=torch.int8), scale, zero, bits=4)
    kept = torch.tensor([[False, True, True, True]])
    # The first was pruned: its weight lay at 3 on the grid.
    codes = LearnedCodes(grid, Grid(4, 4, False), torch.tensor([[1.0, -0.4, 0.1, 0.8]]), kept)
    assert torch.equal(codes.stored(), grid.codes)
    with torch.no_grad():
        codes.offset += 1
    assert codes.stored().tolist() == [[1, 1, 2, 4]]
    codes().sum().backward()
    assert codes.offset.grad is not None
    assert codes.offset.grad.tolist() == [[0.0, 1.0, 1.0, 1.0]]


def test_rounded_activations_pass_gradients() -> None:
    linear = QuantizedLinear(layer().part(GridCodes))
    tuned, x = TunedLinear(linear, None, 8), torch.randn(3, 16, requires_grad=True)
    out = tuned(x)
    assert torch.equal(out, functional.linear(round_tokens(x.detach(), 8), linear.read()))
    out.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, linear.read().sum(0).expand(3, 16))
    # What lies beside the bulk multiplies the inputs as they are, and columns kept apart are not rounded.
    linear, x = layer(), x.detach()
    bulk = round_tokens(x.index_fill(1, linear.part(Columns).index.long(), 0), 8) @ linear.read_bulk().T
    expected = bulk + x @ (linear.read() - linear.read_bulk()).T
    assert torch.allclose(TunedLinear(linear, None, 8)(x), expected, atol=1e-5)


def test_norms_learn_in_their_stored_dtype() -> None:
    norm = nn.RMSNorm(4)
    norm.requires_grad_(False)
    learned = learn_parameter(norm, "weight", torch.bfloat16)
    x = torch.randn(2, 4)
    before = norm(x)
    with torch.no_grad():
        learned.offset += torch.tensor([0.1, 0.0, 0.0, 0.003])
    changed = norm(x) / before
    assert changed[0].tolist() == pytest.approx([1.1015625, 1.0, 1.0, 1.0]), "0.003 is less than half a step"
    norm(x).sum().backward()
    assert learned.offset.grad is not None
    assert [name for name, p in norm.named_parameters() if p.requires_grad] == ["learned_weight.offset"]
