"""What prune steps make zero against a few lines of float64, and SparseGPT's weights against one inverse a channel."""

import pytest
import torch

from quant_methods.handlers import PRUNERS, LinearProblem
from quant_methods.methods.gptq import factorize
from quant_methods.methods.pruning import Magnitude, Wanda
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.steps import PruneStep
from tests.quant_methods.methods.test_gptq import as_problem
from tests.quant_methods.methods.test_gptq import problem as correlated


def prune(step: PruneStep, given: LinearProblem) -> torch.Tensor:
    weight = given.weight.clone()
    found = PRUNERS[type(step)].prune(step, given)
    assert found.dtype == weight.dtype
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
    for step in (Magnitude(sparsity=0.3), Magnitude(pattern="2:4"), Wanda(pattern="4:8"), SparseGPT(pattern="2:4")):
        assert int((prune(step, given) == 0).sum()) == round(5 * 24 * step.sparsity)


@pytest.mark.parametrize(("rows", "columns"), [(7, 13), (33, 257)])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_wanda_compares_sizes_times_norms_of_inputs_within_rows(rows: int, columns: int, sparsity: float) -> None:
    weight, _ = correlated(rows, columns, seed=rows)
    inputs = torch.randn(50, columns, dtype=torch.float64) * torch.logspace(-2, 2, columns, dtype=torch.float64)
    inputs[:, 3] = 0
    scores = weight.abs() * inputs.norm(dim=0)
    given = as_double(weight, inputs.T @ inputs / 50)
    found = prune(Wanda(sparsity=sparsity), given)
    expected = by_sorting(scores, round(columns * sparsity))
    assert expected[:, 3].all()
    assert torch.equal(found, weight * ~expected)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_wanda_compares_neighbours(pattern: str) -> None:
    weight, hessian = correlated(9, 72, seed=1)
    found = prune(Wanda(pattern=pattern), as_double(weight, hessian))
    scores, (kept, among) = weight.abs() * hessian.diagonal().sqrt(), map(int, pattern.split(":"))
    assert torch.equal(found, weight * ~within(scores, among, among - kept))


def as_double(weight: torch.Tensor, hessian: torch.Tensor) -> LinearProblem:
    return LinearProblem("layer", weight, hessian, cross=None, residual=None, scale_dtype=torch.bfloat16)


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, step: SparseGPT, dead: list[int]) -> torch.Tensor:
    """SparseGPT's Algorithm 1 with the inverse of the Hessian of all channels that are left, for every channel."""
    weight, columns = weight.clone(), weight.shape[1]
    width = 128 if step.kept_among is None else step.kept_among[1]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for j in range(columns):
        if j % width == 0:
            block = range(j, min(j + width, columns))
            costs = torch.stack([weight[:, k] ** 2 / inverse[k][0, 0] * (k not in dead) for k in block], 1)
            if step.kept_among is None:
                least = by_sorting(costs.view(1, -1), round(costs.numel() * step.sparsity)).view_as(costs)
            else:
                least = by_sorting(costs, width - step.kept_among[0])
            mask[:, j : j + width] = least
        error = weight[:, j] * mask[:, j]
        weight[:, j:] -= error[:, None] / inverse[j][0, 0] * inverse[j][0]
    return weight.masked_fill(mask, 0)


@pytest.mark.parametrize(
    ("rows", "columns", "settings"),
    [
        (7, 13, {"sparsity": 0.5}),
        (9, 128, {"sparsity": 0.2}),
        (5, 299, {"sparsity": 0.7}),
        (11, 132, {"pattern": "2:4"}),
        (3, 144, {"pattern": "4:8"}),
        (6, 40, {"pattern": "1:4", "sparsity": 0.75}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dead", [[], [5]], ids=["all channels", "one dead"])
def test_sparsegpt_matches_one_inverse_a_channel(
    rows: int, columns: int, settings: dict[str, float | str], dead: list[int]
) -> None:
    weight, hessian = correlated(rows, columns, seed=columns)
    hessian[dead] = 0
    hessian[:, dead] = 0
    step = SparseGPT(damping=0.01, **settings)
    found = prune(step, as_double(weight, hessian))
    expected = sparsegpt(weight, factorize(hessian, 0.01)[0], step, dead)
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)
    if dead:
        assert (found[:, 5] == 0).all()


@pytest.mark.parametrize("settings", [{}, {"pattern": "2:4"}, {"pattern": "4:8"}], ids=str)
def test_what_is_lost_on_correlated_inputs_falls_from_method_to_method(settings: dict[str, str]) -> None:
    for seed in range(3):
        weight, hessian = correlated(64, 256, seed=seed, tokens=2000)

        def lost(step: PruneStep, weight: torch.Tensor = weight, hessian: torch.Tensor = hessian) -> float:
            error = prune(step, as_double(weight, hessian)) - weight
            return ((error @ hessian) * error).sum().sqrt().item()

        magnitude, wanda, sparse = lost(Magnitude(**settings)), lost(Wanda(**settings)), lost(SparseGPT(**settings))
        assert sparse < wanda < magnitude
