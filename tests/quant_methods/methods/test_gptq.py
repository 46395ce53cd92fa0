"""GPTQ against a plain float64 implementation of the paper's Algorithm 1 and against round-to-nearest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import Grid, expand, fit
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.handlers import LinearProblem
from quant_methods.methods import feedback, gptq
from quant_methods.methods.gptq import GPTQ, factorize, quantize, relative_error, solve
from quant_methods.methods.rtn import RTN
from quant_methods.methods.rtn import quantize as round_to_nearest


def problem(rows: int, columns: int, seed: int, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and the Hessian of correlated inputs with very different scales."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    inputs = inputs * torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs / tokens


def reference(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, order: list[int]
) -> torch.Tensor:
    """4-bit optimal brain quantization in a fixed order, one inverse Hessian a channel (Eqs. 2 and 3)."""
    weight = weight.clone()
    codes = torch.zeros_like(weight)
    left = list(order)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        j = left[0]
        code = (weight[:, j] / scale[:, j]).round() + zero[:, j]
        codes[:, j] = code.clamp(-8, 7)
        error = weight[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]
        weight[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize(("rows", "columns", "group"), [(7, 96, 32), (33, 257, -1), (5, 1, -1), (16, 384, 128)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_the_papers_updates_in_activation_order(rows: int, columns: int, group: int, symmetric: bool) -> None:
    weight, hessian = problem(rows, columns, seed=rows)
    hessian, _ = factorize(hessian, 0.01)
    grid = Grid(4, group, symmetric)
    codes, scale, zero = solve(weight, hessian, grid, act_order=True)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    expected = reference(weight, hessian, expand(scale, columns), expand(zero, columns), order=order)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(("rows", "columns", "group"), [(9, 192, 64), (12, 257, -1)])
def test_matches_the_papers_updates_in_index_order(rows: int, columns: int, group: int) -> None:
    weight, hessian = problem(rows, columns, seed=3)
    hessian, _ = factorize(hessian, 0.01)
    grid = Grid(4, group, False)
    codes, scale, zero = solve(weight, hessian, grid, act_order=False)
    expected = reference(weight, hessian, expand(scale, columns), expand(zero, columns), order=list(range(columns)))
    assert torch.equal(codes, expected)


def test_without_activation_order_a_groups_grid_sees_the_updated_weights() -> None:
    weight, hessian = problem(8, 256, seed=4)
    hessian, _ = factorize(hessian, 0.01)
    _, scale, _ = solve(weight, hessian, Grid(4, 64, True), act_order=False)
    static, _ = fit(weight, Grid(4, 64, True), hessian, "mse")
    assert torch.equal(scale[:, 0], static[:, 0])
    assert not torch.equal(scale[:, 1:], static[:, 1:])


def as_problem(weight: torch.Tensor, hessian: torch.Tensor, **extra: torch.Tensor | None) -> LinearProblem:
    given = {"cross": None, "residual": None, **extra}
    return LinearProblem("layer", weight.float(), hessian.float(), scale_dtype=torch.bfloat16, **given)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [True, False])
def test_output_error_is_below_round_to_nearest(bits: int, act_order: bool) -> None:
    weight, hessian = problem(64, 256, seed=5)
    settings = {"bits": bits, "group_size": 128, "symmetric": True}
    given = as_problem(weight, hessian)
    solved = quantize(GPTQ(**settings, act_order=act_order), given)
    rounded = round_to_nearest(RTN(**settings), given)
    error = relative_error(weight.float(), solved, hessian.float())
    assert error < 0.8 * relative_error(weight.float(), rounded, hessian.float())


def test_channels_without_input_are_rounded_to_nearest() -> None:
    weight, hessian = problem(16, 128, seed=6)
    dead = [0, 5, 127]
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = quantize(GPTQ(group_size=32, symmetric=False), as_problem(weight, hessian))
    grid = result.part(GridCodes)
    read = (grid.codes.float() - expand(grid.zero_point.float(), 128)) * expand(grid.scale.float(), 128)
    scale = expand(grid.scale.float(), 128).abs()
    inside = ((read - weight.float()).abs() / scale)[:, dead]
    # Only weights beyond a clipped range may lie further off than half a step.
    at_the_end = (grid.codes == -8) | (grid.codes == 7)
    assert (inside <= 0.5 + 1e-3).logical_or(at_the_end[:, dead]).all()
    assert torch.isfinite(read).all()


def test_singular_hessian_is_damped_until_it_factors() -> None:
    weight, _ = problem(8, 64, seed=7)
    one = torch.randn(64, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    rank_one = one @ one.T
    result = quantize(GPTQ(group_size=32), as_problem(weight, rank_one))
    assert torch.isfinite(result.part(GridCodes).scale.float()).all()
    # Indefinite by rounding, beyond what 1% of the mean diagonal repairs.
    indefinite = rank_one - 0.05 * torch.eye(64, dtype=torch.float64)
    damped, factor = factorize(indefinite, 0.01)
    assert torch.allclose(factor @ factor.T, damped)
    assert torch.linalg.eigvalsh(damped).min() > 0


def test_no_inputs_at_all_is_round_to_nearest() -> None:
    weight, _ = problem(8, 64, seed=8)
    zero = torch.zeros(64, 64)
    solved = quantize(GPTQ(group_size=32, symmetric=True), as_problem(weight, zero))
    rounded = round_to_nearest(RTN(group_size=32, symmetric=True), as_problem(weight, zero))
    assert torch.equal(solved.part(GridCodes).codes, rounded.part(GridCodes).codes)


def test_infinite_activations_are_one_clear_line() -> None:
    weight, hessian = problem(4, 32, seed=9)
    hessian[3, 3] = torch.inf
    with pytest.raises(ParetoError, match="layer: the calibration activations are not finite"):
        quantize(GPTQ(group_size=32), as_problem(weight, hessian))


def test_upstream_correction_moves_the_output_towards_the_originals() -> None:
    generator = torch.Generator().manual_seed(10)
    weight, _ = problem(48, 128, seed=10)
    mix = torch.randn(128, 128, generator=generator, dtype=torch.float64) / 128**0.5
    original = torch.randn(2000, 128, generator=generator, dtype=torch.float64) @ mix
    # Quantizing the layers before scales and shifts the inputs; the residual stream has lost something too.
    inputs = 0.9 * original + 0.05 * torch.randn(2000, 128, generator=generator, dtype=torch.float64)
    lost = original @ torch.randn(128, 48, generator=generator, dtype=torch.float64) * 0.05
    hessian = inputs.T @ inputs / 2000
    cross = ((original - inputs).T @ inputs / 2000).float()
    residual = (lost.T @ inputs / 2000).float()

    def error(**extra: torch.Tensor) -> float:
        result = quantize(GPTQ(group_size=128, bits=8, upstream_damping=0.01), as_problem(weight, hessian, **extra))
        grid = result.part(GridCodes)
        read = (grid.codes.double() - grid.zero_point.double()) * grid.scale.double()
        return (original @ weight.T + lost - inputs @ read.T).square().mean().item()

    plain, corrected, both = error(), error(cross=cross), error(cross=cross, residual=residual)
    assert corrected < 0.7 * plain
    assert both < 0.7 * corrected


def test_upstream_damping_keeps_little_data_from_being_fitted_too_closely() -> None:
    generator = torch.Generator().manual_seed(11)
    weight, _ = problem(48, 128, seed=11)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs of the original and the quantized model, and what the residual stream has lost: noise, mostly."""
        original = torch.randn(count, 128, generator=generator, dtype=torch.float64)
        inputs = 0.9 * original + 0.3 * torch.randn(count, 128, generator=generator, dtype=torch.float64)
        return original, inputs, torch.randn(count, 48, generator=generator, dtype=torch.float64)

    original, inputs, lost = drawn(400)
    statistics = {
        "cross": ((original - inputs).T @ inputs / 400).float(), "residual": (lost.T @ inputs / 400).float()
    }  # fmt: skip
    fresh = drawn(20000)

    def error(**settings: float | bool) -> float:
        step = GPTQ(group_size=128, bits=8, **settings)
        extra = statistics if step.upstream else {}
        result = quantize(step, as_problem(weight, inputs.T @ inputs / 400, **extra))
        grid = result.part(GridCodes)
        read = (grid.codes.double() - grid.zero_point.double()) * grid.scale.double()
        return (fresh[0] @ weight.T + fresh[2] - fresh[1] @ read.T).square().mean().item()

    assert error() < 0.8 * error(upstream_damping=0.01)
    assert error(upstream_damping=1.0) == error()
    assert error(upstream_damping=100.0) == pytest.approx(error(upstream=False), rel=0.02)
    with pytest.raises(ParetoError, match=r"upstream_damping: 0.0 is not in \(0, 100\]; 1 is good"):
        GPTQ(upstream_damping=0.0).check()


def test_only_the_loop_over_channels_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, set[int]] = {}

    def counted(name: str) -> Callable[..., Any]:
        called = getattr(feedback if name != "fit" else gptq, name)

        def call(*args: Any, **named: Any) -> Any:
            threads.setdefault(name, set()).add(torch.get_num_threads())
            return called(*args, **named)

        return call

    for name in ("inverse_factor", "_one_by_one", "fit"):
        monkeypatch.setattr(feedback if name != "fit" else gptq, name, counted(name))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inputs = torch.randn(300, 192)
        given = LinearProblem("layer", torch.randn(16, 192), inputs.T @ inputs / 300, None, None, torch.bfloat16)
        gptq.quantize(GPTQ(bits=4, group_size=64), given)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == {"inverse_factor": {3}, "_one_by_one": {1}, "fit": {3}}
