"""Low-rank compensation: the nearest product of a rank, in the metric asked for."""

import dataclasses

import pytest
import torch

from quant_methods.block_solver import solve
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.handlers import LinearProblem
from quant_methods.methods.gptq import GPTQ, aim, factorize, relative_error
from quant_methods.methods.rtn import RTN
from quant_methods.methods.zeroquant import low_rank
from quant_methods.steps import RoundStep


def given(seed: int = 0) -> LinearProblem:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1500, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 11
    inputs *= torch.exp(torch.randn(128, generator=generator))
    weight = torch.randn(64, 128, generator=generator)
    return LinearProblem("layer", weight, inputs.T @ inputs / len(inputs), None, None, torch.bfloat16)


def test_without_a_metric_it_is_the_truncated_decomposition() -> None:
    error = torch.randn(40, 64, dtype=torch.float64)
    product = low_rank(error, None, 5, torch.float64)
    assert product.up.shape == (40, 5)
    assert product.down.shape == (5, 64)
    left = (error - product.up @ product.down).square().sum().item()
    # Eckart, Young: what is left is the sum of the other singular values' squares.
    assert left == pytest.approx(torch.linalg.svdvals(error)[5:].square().sum().item(), rel=1e-3)
    assert torch.allclose(product.up.norm(dim=0), product.down.norm(dim=1)), "both factors carry half of the size"


def test_many_directions_come_within_a_percent_of_the_whole_decomposition() -> None:
    # Noise is the hardest case: no direction stands out.
    error = torch.randn(300, 500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sizes = torch.linalg.svdvals(error).square()
    state = torch.get_rng_state()
    product = low_rank(error, None, 8, torch.float64)
    assert torch.equal(torch.get_rng_state(), state), "other random numbers are none of its business"
    taken = sizes.sum() - (error - product.up @ product.down).square().sum()
    assert taken > 0.99 * sizes[:8].sum()


def test_with_a_metric_no_other_product_leaves_less_output_error() -> None:
    torch.manual_seed(1)
    error, factor = torch.randn(12, 20, dtype=torch.float64), torch.randn(20, 20, dtype=torch.float64).tril()
    factor.diagonal().abs_().add_(0.5)
    product = low_rank(error, factor, 3, torch.float64)
    left = ((error - product.up @ product.down) @ factor).square().sum()
    assert left.item() == pytest.approx(torch.linalg.svdvals(error @ factor)[3:].square().sum().item(), rel=1e-3)
    for _ in range(20):
        other = (product.up + 0.01 * torch.randn(12, 3)) @ (product.down + 0.01 * torch.randn(3, 20))
        assert ((error - other) @ factor).square().sum() > left


@pytest.mark.parametrize("step", [RTN(bits=3, symmetric=False), GPTQ(bits=3, symmetric=False)], ids=["rtn", "gptq"])
def test_error_falls_with_the_rank(step: RoundStep) -> None:
    problem = given()
    errors = []
    for rank in (0, 4, 16, 64):
        result = solve(
            dataclasses.replace(step, rank=rank), dataclasses.replace(problem, weight=problem.weight.clone())
        )
        errors.append(relative_error(problem.weight, result, problem.hessian))
        assert (result.get(LowRank) is None) == (rank == 0)
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.85 * errors[0]
    assert errors[3] < 0.05 * errors[0], "a full rank makes up for everything but its own rounding"


def test_the_outputs_metric_beats_the_weights_on_outputs_and_loses_on_weights() -> None:
    problem = given()
    step = RTN(bits=3, symmetric=False, rank=8)
    outputs, weights = solve(step, problem), solve(dataclasses.replace(step, rank_metric="weights"), problem)
    assert relative_error(problem.weight, outputs, problem.hessian) < 0.95 * relative_error(
        problem.weight, weights, problem.hessian
    )
    assert relative_error(problem.weight, outputs, None) > relative_error(problem.weight, weights, None)


def test_it_aims_where_gptq_aims() -> None:
    problem = given()
    assert problem.hessian is not None
    # The original model's inputs were 1.1 times as large.
    result = solve(
        GPTQ(bits=4, rank=4, upstream_damping=0.01), dataclasses.replace(problem, cross=0.1 * problem.hessian)
    )
    assert relative_error(1.1 * problem.weight, result, problem.hessian) < 0.06
    assert relative_error(problem.weight, result, problem.hessian) > 0.09


def test_it_goes_with_outlier_channels() -> None:
    problem = given()
    problem.largest = problem.hessian.diagonal().sqrt()
    plain = solve(GPTQ(bits=3, outliers=0.05), problem)
    both = solve(GPTQ(bits=3, outliers=0.05, rank=8), problem)
    assert both.part(LowRank).down[:, both.part(Columns).index.long()].abs().max() < 1e-4
    assert relative_error(problem.weight, both, problem.hessian) < 0.95 * relative_error(
        problem.weight, plain, problem.hessian
    )


@pytest.mark.parametrize("step", [RTN(bits=4, symmetric=False), GPTQ(bits=4, symmetric=False)], ids=["rtn", "gptq"])
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_after_pruning_it_makes_up_for_zeros_too(step: RoundStep, shift: float) -> None:
    problem = given()
    assert problem.hessian is not None
    zeros = torch.zeros(64, 128, dtype=torch.bool)
    zeros[:, ::2] = True
    dense = problem.weight.clone()
    cross = shift * problem.hessian
    layer = dataclasses.replace(problem, weight=dense.masked_fill(zeros, 0), dense=dense, cross=cross)
    result = solve(dataclasses.replace(step, rank=16), layer)
    assert (result.read_bulk()[zeros] == 0).all()
    # What is left is the rest of the decomposition of E H^1/2, as EoRA has it, up to 16-bit factors.
    hessian = factorize(problem.hessian, 0.01)[0]
    error = (aim(dataclasses.replace(problem, cross=cross)) - result.bulk.read()).double()
    values, vectors = torch.linalg.eigh(hessian)
    rest = torch.linalg.svdvals(error @ (vectors * values.sqrt()))[16:].square().sum().item()
    left = error - (result.read() - result.bulk.read()).double()
    assert ((left @ hessian) * left).sum().item() == pytest.approx(rest, rel=0.01)
    assert torch.equal(problem.weight, dense)
