"""What is fitted after pruning, against one least-squares problem a row in float64."""

import dataclasses

import pytest
import torch

from quant_methods.formats.grid import Grid
from quant_methods.handlers import PRUNERS, LinearProblem
from quant_methods.methods.gptq import aim, factorize, solve
from quant_methods.methods.pruning import Magnitude, Wanda, pruned
from quant_methods.methods.refit import refit
from quant_methods.methods.sparsegpt import SparseGPT, prune_and_round
from quant_methods.steps import PruneStep
from tests.quant_methods.methods.test_pruning import as_double, of_few_factors

STEPS = [
    method(refit=True, **settings)
    for method in (Magnitude, Wanda, SparseGPT)
    for settings in ({"sparsity": 0.7}, {"pattern": "2:4"})
]


def least_squares(target: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return w_S = H_SS^-1 (H w)_S of each row."""
    found = torch.zeros_like(target)
    for row, support in enumerate(kept):
        found[row, support] = torch.linalg.solve(hessian[support][:, support], (target[row] @ hessian)[support])
    return found


def lost(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return what each row's output loses, squared."""
    return ((error @ hessian) * error).sum(1)


def layer(rows: int, columns: int, seed: int) -> LinearProblem:
    weight, hessian = of_few_factors(rows, columns, seed)
    hessian[3] = 0
    hessian[:, 3] = 0
    generator = torch.Generator().manual_seed(seed)
    residual = 0.1 * torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ hessian
    return dataclasses.replace(as_double(weight, hessian), residual=residual)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.method}-{step.pattern}")
@pytest.mark.parametrize(("rows", "columns"), [(7, 52), (33, 260), (1, 4)])
def test_what_is_left_is_the_least_squares_fit(step: PruneStep, rows: int, columns: int) -> None:
    given = layer(rows, columns, seed=columns)
    before = PRUNERS[type(step)].prune(step, given)
    found, weight = pruned(step, given), given.weight.clone()
    assert torch.equal(given.weight, weight)
    assert torch.equal(found == 0, before == 0)
    assert (found[before == 0] == 0).all()
    hessian, target = factorize(given.hessian, 0.1)[0], aim(given)
    expected = least_squares(target, before != 0, hessian)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    best = lost(expected - target, hessian)
    assert (lost(found - target, hessian) <= best * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("damping", [1e-7, 0.1])
def test_no_row_is_further_away_than_it_was(dtype: torch.dtype, share: float, damping: float) -> None:
    weight, hessian = of_few_factors(65, 131, 5)
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(3 * torch.randn(131, generator=generator, dtype=torch.float64))
    hessian = factorize(hessian * scales * scales[:, None], damping)[0]
    kept = torch.rand(weight.shape, generator=generator) < share
    start = (weight * kept).to(dtype)
    found = refit(weight.to(dtype), start, kept, hessian)
    assert found.dtype == dtype
    assert (found[~kept] == 0).all()
    before, after = (lost(part.double() - weight, hessian) for part in (start, found))
    assert (after <= before * (1 + 1e-5) + 1e-30).all()
    if 0 < share < 1:
        assert after.sum() < before.sum()
    if share == 1:
        assert torch.equal(found, start), "all that is left is where it was"


@pytest.mark.parametrize("settings", [{}, {"pattern": "2:4"}, {"sparsity": 0.7}], ids=str)
def test_each_method_gains_and_so_does_what_is_rounded(settings: dict[str, float | str]) -> None:
    for seed in range(3):
        weight, hessian = of_few_factors(64, 256, seed)
        given = as_double(weight, hessian)

        def error(found: torch.Tensor, weight: torch.Tensor = weight, hessian: torch.Tensor = hessian) -> float:
            return lost(found - weight, hessian).sum().sqrt().item()

        for method in (Magnitude, Wanda, SparseGPT):
            plain, fitted = (pruned(method(refit=on, **settings), given) for on in (False, True))
            assert error(fitted) < 0.97 * error(plain)
        joint = [
            SparseGPT(bits=4, group_size=64, symmetric=False, refit=refits, **settings) for refits in (False, True)
        ]
        plain, fitted = (prune_and_round(step, step.rounding, given).read() for step in joint)
        assert error(fitted) < 0.95 * error(plain)


def test_codes_after_pruning_start_from_the_fit() -> None:
    weight, hessian = of_few_factors(32, 128, 1)
    kept = weight.abs() > weight.abs().median()
    codes, scale, zero = solve(weight, hessian, Grid(8, -1, True), kept=kept)
    assert torch.equal((codes - zero)[~kept], torch.zeros_like(weight)[~kept])
    best = least_squares(weight, kept, hessian)
    close = lost((codes - zero) * scale - weight, hessian).sum()
    assert close < 1.02 * lost(best - weight, hessian).sum()
