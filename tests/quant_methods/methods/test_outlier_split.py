"""Outlier channels kept apart: which ones, and that they make up for the others' error as least squares would."""

import dataclasses

import pytest
import torch

from quant_methods.block_solver import solve
from quant_methods.formats.grid import round_tokens
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.handlers import LinearProblem
from quant_methods.methods.gptq import GPTQ, relative_error
from quant_methods.methods.outlier_split import choose
from quant_methods.methods.rtn import RTN
from quant_methods.steps import RoundStep

OUTLIERS = [3, 40, 77, 100]


def given(seed: int = 0, factor: float = 50.0) -> tuple[LinearProblem, torch.Tensor]:
    """Return a layer and its inputs, in which four channels are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1500, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 11
    inputs[:, OUTLIERS] *= factor
    weight = torch.randn(32, 128, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    return LinearProblem("layer", weight, hessian, None, None, torch.bfloat16, inputs.abs().amax(0)), inputs


def read_columns(result: QuantizedLinear) -> torch.Tensor:
    return result.part(Columns).read()


@pytest.mark.parametrize("choice", ["range", "energy", "threshold"])
def test_planted_outliers_are_found(choice: str) -> None:
    problem, _ = given()
    assert choose(RTN(outliers=4 / 128, outlier_choice=choice), problem).tolist() == OUTLIERS


def test_the_threshold_is_the_papers() -> None:
    problem, _ = given(factor=1.0)
    problem.largest = torch.linspace(0, 12, 128)
    kept = choose(RTN(outliers=0.45, outlier_choice="threshold"), problem)
    assert kept.tolist() == [j for j in range(128) if j * 12 / 127 >= 6.0][-58:]
    problem.largest = problem.largest / 3
    result = solve(RTN(bits=8, outliers=0.45, outlier_choice="threshold"), problem)
    assert result.get(Columns) is None


def test_round_to_nearest_leaves_the_others_alone() -> None:
    problem, _ = given()
    result = solve(RTN(bits=8, group_size=-1, outliers=4 / 128), problem)
    columns = result.part(Columns)
    assert columns.index.tolist() == OUTLIERS
    assert columns.index.dtype == torch.int32
    assert torch.equal(columns.weight, problem.weight[:, OUTLIERS].bfloat16())
    rest = dataclasses.replace(problem, weight=problem.weight.clone())
    rest.weight[:, OUTLIERS] = 0
    plain = solve(RTN(bits=8, group_size=-1), rest)
    assert torch.equal(result.part(GridCodes).codes, plain.part(GridCodes).codes)


def test_eight_bit_channels_are_near_sixteen_bit_ones() -> None:
    problem, _ = given()
    step = GPTQ(bits=4, group_size=128, outliers=0.05)
    sixteen = read_columns(solve(step, problem))
    result = solve(dataclasses.replace(step, outlier_bits=8), problem)
    columns = result.part(Columns)
    assert columns.weight.dtype == torch.int8
    assert columns.scale is not None
    step_size = columns.scale.float()[:, None]
    assert ((read_columns(result) - sixteen).abs() <= 0.51 * step_size + 2**-8 * sixteen.abs()).all()


@pytest.mark.parametrize("step", [GPTQ(bits=3, group_size=64), RTN(bits=3, search="output")], ids=["gptq", "rtn"])
def test_kept_channels_are_the_least_squares_solution(step: RoundStep) -> None:
    problem, inputs = given()
    result = solve(dataclasses.replace(step, outliers=0.05), problem)
    kept = result.part(Columns).index.long()
    missing = inputs @ problem.weight.T - inputs @ result.read_bulk().T
    expected = torch.linalg.lstsq(inputs[:, kept].double(), missing.double()).solution.T
    assert torch.allclose(read_columns(result).double(), expected, rtol=0.02, atol=0.02)


def test_gptq_gains_from_kept_channels() -> None:
    # Correlated with the others, the kept channels can absorb part of the others' error.
    generator = torch.Generator().manual_seed(5)
    shared = torch.randn(2000, 6, generator=generator)
    inputs = torch.randn(2000, 128, generator=generator) + 2 * shared @ torch.randn(6, 128, generator=generator)
    inputs[:, OUTLIERS] *= 20
    weight = torch.randn(32, 128, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    problem = LinearProblem("layer", weight, hessian, None, None, torch.bfloat16, inputs.abs().amax(0))
    step = GPTQ(bits=4, group_size=128)
    apart = solve(dataclasses.replace(step, outliers=4 / 128), problem)
    stays = apart.having(dataclasses.replace(apart.part(Columns), weight=weight[:, OUTLIERS]))
    error = relative_error(weight, apart, hessian)
    assert error < 0.8 * relative_error(weight, solve(step, problem), hessian)
    assert error < 0.8 * relative_error(weight, stays, hessian)


def test_upstream_correction_reaches_the_kept_channels() -> None:
    problem, inputs = given()
    original = inputs * 1.1  # The original model's inputs were larger: all weights should grow.
    problem.cross = (original - inputs).T @ inputs / len(inputs)
    read = solve(GPTQ(bits=8, group_size=128, outliers=0.05), problem).read()
    target = original @ problem.weight.T
    assert (inputs @ read.T - target).norm() < 0.02 * target.norm()
    assert (inputs @ problem.weight.T - target).norm() > 0.08 * target.norm()


def test_eight_bit_activations_survive_outliers() -> None:
    problem, inputs = given(factor=300.0)
    step = RTN(bits=8, group_size=-1, activations="int8")
    target = inputs @ problem.weight.T

    def error(result: QuantizedLinear) -> float:
        rest = inputs.clone()
        columns = result.get(Columns)
        kept = columns.index.long() if columns is not None else torch.tensor([], dtype=torch.long)
        rest[:, kept] = 0
        found = round_tokens(rest, 8) @ result.read_bulk().T
        if columns is not None:
            found += inputs[:, kept] @ columns.read().T
        bulk = target - inputs[:, OUTLIERS] @ problem.weight[:, OUTLIERS].T
        return ((found - target).norm() / bulk.norm()).item()

    assert error(solve(step, problem)) > 0.2
    assert error(solve(dataclasses.replace(step, outliers=4 / 128), problem)) < 0.3
