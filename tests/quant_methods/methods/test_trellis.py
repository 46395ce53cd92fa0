"""Trellis codes: the loop against GPTQ of whole blocks in float64, output errors against a grid's, scales refitted."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import expand
from quant_methods.formats.parts.trellis import pair_values
from quant_methods.formats.parts.trellis_codes import TrellisCodes
from quant_methods.handlers import LinearProblem
from quant_methods.kernels.trellis_search import search
from quant_methods.methods import trellis
from quant_methods.methods.gptq import GPTQ, factorize, relative_error
from quant_methods.methods.gptq import quantize as gptq
from quant_methods.methods.trellis import Trellis, first_scales, fitted_scales, quantize, solve

pytestmark = pytest.mark.usefixtures("fresh_numbers")


def given(rows: int = 64, columns: int = 128) -> LinearProblem:
    """A layer with correlated inputs of very different sizes, and some large weights."""
    inputs = torch.randn(2000, columns) @ torch.randn(columns, columns) / columns**0.5
    inputs *= torch.exp(0.5 * torch.randn(columns))
    weight = torch.randn(rows, columns) * torch.exp(0.3 * torch.randn(rows, columns))
    return LinearProblem("layer", weight, inputs.T @ inputs / 2000, None, None, torch.bfloat16)


def loss(weight: Tensor, read: Tensor, hessian: Tensor) -> Tensor:
    error = (weight - read).double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.9), (3, 0.85), (4, 0.85)])
def test_its_output_error_is_below_gptqs_on_a_grid_that_takes_more_bits(bits: int, share: float) -> None:
    problem = given()
    coded = quantize(Trellis(bits=bits), dataclasses.replace(problem, weight=problem.weight.clone()))
    grid = gptq(GPTQ(bits=bits, group_size=64, symmetric=False), problem)
    found, other = (relative_error(problem.weight, linear, problem.hessian) for linear in (coded, grid))
    assert found < share * other


def test_feedback_and_refitted_scales_each_lower_the_output_error() -> None:
    problem = given()
    hessian = factorize(problem.hessian, 0.01)[0]
    alone = solve(problem.weight, hessian.diagonal().diag(), 3, 64, refit=False)
    fed_back = solve(problem.weight, hessian, 3, 64, refit=False)
    refitted = solve(problem.weight, hessian, 3, 64)
    assert torch.equal(refitted.words, fed_back.words)
    errors = [loss(problem.weight, codes.read(), hessian) for codes in (alone, fed_back, refitted)]
    assert errors[1].sum() < 0.8 * errors[0].sum()
    # The least for the streams; storing scales in 16 bits takes a little of it away.
    assert bool((errors[2] < 1.001 * errors[1]).all())
    assert errors[2].sum() < 0.999 * errors[1].sum()


def test_the_loop_is_gptqs_step_of_whole_blocks_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = given(32, 64)
    hessian, targets = factorize(problem.hessian, 0.1)[0], []

    def seen(given: Tensor, bits: int, weights: Tensor) -> Tensor:
        targets.append((given, weights))
        return search(given, bits, weights)

    monkeypatch.setattr(trellis, "search", seen)
    monkeypatch.setattr(trellis, "LATER", 24)
    codes = solve(problem.weight, hessian, 3, 32, refit=False)
    scale, read = expand(codes.scale.double(), 64), codes.read().double()
    left = sorted(range(8), key=lambda block: -float(hessian.diagonal()[8 * block : 8 * block + 8].sum()))
    work = problem.weight.double()
    for target, weights in targets:
        own = slice(8 * left[0], 8 * left[0] + 8)
        rest = [8 * block + at for block in left for at in range(8)]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        wanted = (work / scale)[:, own].reshape(1, 128, 2)
        assert torch.allclose(target.double(), wanted, atol=1e-4)
        # What a channel's error costs, were those of its block independent.
        cost = torch.linalg.inv(inverse[:8, :8]).diagonal() * scale[:, own].square()
        assert torch.allclose((weights / weights.mean()).double(), (cost / cost.mean()).reshape(1, 128, 2), rtol=1e-3)
        work[:, rest] -= (work - read)[:, own] @ torch.linalg.inv(inverse[:8, :8]) @ inverse[:8]
        left = left[1:]
    assert not left


def test_fitted_scales_solve_the_normal_equations() -> None:
    problem = given(8, 64)
    hessian, pairs = factorize(problem.hessian, 0.01)[0], torch.randn(8, 64)
    root = torch.linalg.cholesky(hessian).T
    found = fitted_scales(problem.weight, pairs, hessian, 16)
    for row in range(8):
        spread = pairs[row].double().diag() @ torch.eye(4, dtype=torch.float64).repeat_interleave(16, 0)
        wanted = torch.linalg.lstsq(root @ spread, root @ problem.weight[row].double()[:, None]).solution[:, 0]
        assert torch.allclose(found[row].double(), wanted, rtol=1e-3, atol=1e-5)


def test_first_scales_make_room_for_large_weights_and_are_never_zero() -> None:
    weight = torch.randn(2, 64)
    weight[1] *= 2 / weight[1].abs().max()
    weight[1, 5] = 8.0
    usual, wide = (float(scale) for scale in first_scales(weight, 4, 64)[:, 0])
    values = pair_values()
    assert 0.999 <= usual * float(values.std() / weight[0].square().mean().sqrt()) / trellis.SPREAD < 1.5
    assert wide * float(values.max()) > 0.8 * 8.0
    assert first_scales(torch.zeros(1, 64), 4, 64) > 0


@pytest.mark.parametrize("rows", [3, 40])
def test_rows_that_do_not_fill_a_tile_are_coded_as_if_they_were_alone(rows: int) -> None:
    problem = given(rows)
    codes = quantize(Trellis(bits=4), problem).part(TrellisCodes)
    assert codes.words.shape == (-(-rows // 32), 16, 32)
    assert codes.scale.shape == (rows, 2)
    hessian = problem.hessian.double()
    error = loss(problem.weight, codes.read(), hessian) / loss(problem.weight, torch.zeros(()), hessian)
    assert error.max() < 0.02
    assert torch.isfinite(codes.scale).all()


def test_channels_without_input_and_rows_of_zeros_do_no_harm() -> None:
    problem = given()
    problem.hessian[[3, 9]] = 0
    problem.hessian[:, [3, 9]] = 0
    problem.weight[7] = 0
    read = quantize(Trellis(bits=3), dataclasses.replace(problem, weight=problem.weight.clone())).read()
    assert torch.isfinite(read).all()
    assert read[7].abs().max() < 1e-3
    assert (
        loss(problem.weight, read, problem.hessian).sum()
        < 0.03 * loss(problem.weight, torch.zeros(()), problem.hessian).sum()
    )


def test_without_a_hessian_that_is_finite_it_is_refused() -> None:
    problem = given()
    problem.hessian[3, 3] = torch.nan
    with pytest.raises(ParetoError, match=r"^layer: the calibration activations are not finite \(inf or NaN\)$"):
        quantize(Trellis(), problem)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "trellis: bits: 5: a trellis has 2, 3 or 4 bits; use gptq for more"),
        ({"symmetric": False}, "trellis: a group has a scale and no zero-point; leave symmetric and per_tensor out"),
        ({"activations": "int8"}, "trellis: weights are read as 16-bit numbers; leave activations at none"),
        ({"outliers": 0.01}, "trellis: nothing lies beside the streams; leave outliers and rank out"),
        ({"damping": 0.0}, r"damping: 0.0 is not in \(0, 1\]; 0.1 is usual"),
    ],
)
def test_settings_that_it_has_not_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ParetoError, match=f"^{message}$"):
        Trellis(**settings).check()


def test_the_same_layer_is_coded_alike_twice() -> None:
    problem = given(32, 64)
    first, second = (
        quantize(Trellis(bits=2), dataclasses.replace(problem, weight=problem.weight.clone())).part(TrellisCodes)
        for _ in range(2)
    )
    assert torch.equal(first.words, second.words)
    assert torch.equal(first.scale, second.scale)
