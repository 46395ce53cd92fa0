"""Pruning by magnitude and Wanda's masks against a few lines of float64, and how many weights become zero."""

import pytest
import torch

from quant_methods.handlers import PRUNERS, LinearProblem
from quant_methods.methods.pruning import Magnitude
from quant_methods.steps import PruneStep
from tests.quant_methods.methods.test_gptq import as_problem
from tests.quant_methods.methods.test_gptq import problem as correlated


def prune(step: PruneStep, given: LinearProblem) -> torch.Tensor:
    weight = given.weight.clone()
    found = PRUNERS[type(step)].prune(step, given)
    assert found.dtype == torch.float32
    assert torch.equal(given.weight, weight), "the problem's weight is still needed"
    return found


def by_sorting(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the least scores of each row [rows, n] by a stable sort."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, places in enumerate(scores.argsort(stable=True, dim=1)[:, :count]):
        mask[row, places] = True
    return mask


def within(scores: torch.Tensor, among: int, count: int) -> torch.Tensor:
    return by_sorting(scores.reshape(-1, among), count).reshape(scores.shape)


@pytest.mark.parametrize(("rows", "columns"), [(7, 13), (33, 257), (1, 5)])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.77])
def test_magnitude_takes_the_least_of_the_whole_layer(rows: int, columns: int, sparsity: float) -> None:
    weight, hessian = correlated(rows, columns, seed=rows)
    given = as_problem(weight, hessian)
    found = prune(Magnitude(sparsity=sparsity), given)
    expected = by_sorting(given.weight.double().abs().view(1, -1), round(rows * columns * sparsity)).view(rows, columns)
    assert torch.equal(found == 0, expected)
    assert torch.equal(found, given.weight * ~expected)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75)])
def test_magnitude_takes_the_least_of_neighbours(pattern: str, sparsity: float) -> None:
    weight, hessian = correlated(9, 72, seed=1)
    given = as_problem(weight, hessian)
    found = prune(Magnitude(sparsity=sparsity, pattern=pattern), given)
    kept, among = map(int, pattern.split(":"))
    assert torch.equal(found == 0, within(given.weight.double().abs(), among, among - kept))


def test_of_equal_weights_as_many_are_taken_as_of_others() -> None:
    given = as_problem(torch.ones(5, 24), torch.eye(24))
    for step in (Magnitude(sparsity=0.3), Magnitude(pattern="2:4"), Magnitude(pattern="4:8")):
        assert int((prune(step, given) == 0).sum()) == round(5 * 24 * step.sparsity)
