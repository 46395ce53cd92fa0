import pytest
import torch

from quant_methods.formats import grid as grids
from quant_methods.formats import grid_search
from quant_methods.formats.grid import Grid, dequantize, expand, fit, round_static, round_to_grid, static_scale

GRIDS = [Grid(bits, group, symmetric) for bits in (4, 8) for group in (32, 128, -1) for symmetric in (True, False)]


def quantized(weight: torch.Tensor, grid: Grid, search: str, hessian: torch.Tensor | None = None) -> torch.Tensor:
    scale, zero = fit(weight, grid, hessian, search)
    columns = weight.shape[1]
    codes = round_to_grid(weight, expand(scale, columns), expand(zero, columns), grid)
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    assert torch.equal(scale, scale.bfloat16().float()), "a scale must survive being stored"
    assert torch.equal(zero, zero.round())
    return dequantize(codes, scale, zero)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_minmax_error_is_bounded_by_the_step(grid: Grid) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)) + (0.0 if grid.symmetric else 0.5)
    read = quantized(weight, grid, "minmax")
    scale = expand(fit(weight, grid, None, "minmax")[0], 256)
    # Storing the scale moves the far end of the range by up to 2^-9 of it. A symmetric range ends half a step early,
    # and a zero-point is rounded by up to half a step.
    assert ((read - weight).abs() / scale).max() <= 0.5 + 0.5 + 2.0**grid.bits * 2.0**-9
    # Inside the range the error is that of rounding alone.
    assert ((read - weight).abs() / scale).median() <= 0.3


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mse_search_never_loses_to_minmax(grid: Grid) -> None:
    weight = torch.distributions.StudentT(3.0).sample((32, 256))
    importance = torch.rand(256) + 0.01

    def error(search: str) -> float:
        found = quantized(weight, grid, search, importance.diag())
        return ((found - weight).square() * importance).sum().item()

    assert error("mse") <= error("minmax") * (1 + 1e-5)  # the two sums round differently


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_output_search_has_the_least_output_error_of_each_group(grid: Grid) -> None:
    weight = torch.distributions.StudentT(3.0).sample((16, 256))
    inputs = torch.randn(400, 256) @ (torch.eye(256) + 0.2 * torch.randn(256, 256))
    groups = grid.groups(256)

    def errors(search: str) -> torch.Tensor:
        found = (quantized(weight, grid, search, inputs.T @ inputs / 400) - weight).unflatten(1, (groups, -1))
        return torch.einsum("rgw,tgw->rgt", found, inputs.unflatten(1, (groups, -1))).square().sum(-1)

    least = errors("output")
    for search in ("minmax", "mse"):
        assert (least <= errors(search) * (1 + 1e-4)).all()
    # On 8 bits the ranges can be the same ones.
    assert least.sum() < errors("mse").sum() or grid.bits == 8


def test_symmetric_search_uses_the_code_below_zero_for_the_larger_side() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :9] = torch.arange(9.0)  # 0..8 needs nine nonnegative codes: -8..0 has them under a negative scale
    assert torch.equal(quantized(weight, Grid(4, -1, True), "mse"), weight)


def test_zero_groups_read_back_zero() -> None:
    weight = torch.zeros(4, 64)
    for grid in GRIDS:
        if grid.group_size in (32, -1):
            for search in ("minmax", "mse"):
                assert torch.equal(quantized(weight, grid, search), weight)


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    assert Grid(4, 128, True).bits_per_weight(10, 512) == 4 + 16 / 128
    assert Grid(4, 128, False).bits_per_weight(10, 512) == 4 + 20 / 128
    assert Grid(8, -1, True).bits_per_weight(10, 512) == 8 + 16 / 512


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse", "output"])
def test_one_scale_for_the_tensor_is_that_of_its_weights_in_one_row(symmetric: bool, search: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 32), torch.randn(40, 32)
    hessian = x.T @ x
    scale, zero = fit(weight, Grid(4, -1, symmetric, per_tensor=True), hessian, search)  # type: ignore[arg-type]
    assert scale.shape == zero.shape == (6, 1)
    assert len(scale.unique()) == len(zero.unique()) == 1
    # The same weights in one row, whose outputs' errors add up as those of six rows do.
    apart = torch.block_diag(*[hessian] * 6)
    one, centre = fit(weight.reshape(1, -1), Grid(4, -1, symmetric), apart, search)  # type: ignore[arg-type]
    assert (scale[0], zero[0]) == (one[0], centre[0])
    by_row, _ = fit(weight, Grid(4, -1, symmetric), hessian, search)  # type: ignore[arg-type]
    assert len(by_row.unique()) > 1


def test_a_static_scale_loses_least_on_the_sample() -> None:
    sample = torch.randn(400, 32)
    zero = torch.zeros(1)

    def loss(scale: torch.Tensor) -> float:
        return (round_static(sample, scale, zero, 8) - sample).square().sum().item()

    largest = sample.abs().max().item()
    found = static_scale(sample, largest, 8)
    assert found.shape == (1,)
    tried = [torch.tensor([largest * part / 127]) for part in torch.linspace(0.02, 1.2, 200).tolist()]
    assert loss(found) <= 1.05 * min(map(loss, tried))
    # One token far out, which was not in the sample, is clipped rather than the others lost.
    assert static_scale(sample, 1000 * largest, 8).item() < 20 * found.item()


def isas() -> list[str]:
    """The instruction sets that the compiled search has and this processor too."""
    if grid_search._library() is None:
        return []
    has = torch.backends.cpu.get_cpu_capability()
    return ["best", "generic", *(["avx2"] if "AVX" in has else []), *(["avx512"] if "AVX512" in has else [])]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("width", [1, 37, 64, 1024, 2500])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (8, True)])
def test_the_compiled_search_finds_what_operations_find(monkeypatch, isa, width, bits, symmetric):
    generator = torch.Generator().manual_seed(width + bits)
    wide = torch.randn(30, 3 * width + 5, generator=generator) * 10 ** torch.rand(30, 1, generator=generator)
    weight, grid = wide[:, : 3 * width], Grid(bits, width, symmetric)
    weight[3, :width], weight[5] = 0, 1e-38
    weight[7, 0] = 1e4
    hessian = (torch.rand(3 * width, generator=generator) + 0.1).diag()
    found = grid_search.best_candidates
    monkeypatch.setattr(grids, "best_candidates", lambda *args: found(*args, isa=isa))
    monkeypatch.setattr(grids, "GROUPS_AT_ONCE", 40)  # several parts
    scale, zero = fit(weight, grid, hessian)
    monkeypatch.setattr(grids, "serves", lambda *args: False)
    wanted_scale, wanted_zero = fit(weight, grid, hessian)

    def errors(scale, zero):
        read = dequantize(round_to_grid(weight, expand(scale, 3 * width), expand(zero, 3 * width), grid), scale, zero)
        return ((read - weight).double().square() * hessian.diagonal()).unflatten(1, (3, -1)).sum(-1)

    # Errors are summed in another order, so that one of two candidates that are as good may be found.
    torch.testing.assert_close(errors(scale, zero), errors(wanted_scale, wanted_zero), rtol=1e-5, atol=0)
    assert ((scale == wanted_scale) & (zero == wanted_zero)).float().mean() > 0.9


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("width", [8, 32, 64, 128])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (8, True)])
def test_the_compiled_search_by_output_finds_what_operations_find(monkeypatch, isa, width, bits, symmetric):
    generator = torch.Generator().manual_seed(width + bits)
    weight = torch.randn(30, 3 * width, generator=generator) * 10 ** torch.rand(30, 1, generator=generator)
    weight[3, :width], weight[5] = 0, 1e-38
    weight[7, 0] = 1e4
    inputs = torch.randn(200, 3 * width, generator=generator)
    inputs += inputs[:, :1] * torch.rand(3 * width, generator=generator)
    hessian, grid = inputs.T @ inputs / 200, Grid(bits, width, symmetric)
    assert grid_search.serves(weight.unflatten(1, (3, width)), torch.ones(3, width, width))
    found = grid_search.best_candidates
    monkeypatch.setattr(grids, "best_candidates", lambda *args: found(*args, isa=isa))
    monkeypatch.setattr(grids, "GROUPS_AT_ONCE", 40)  # several parts
    scale, zero = fit(weight, grid, hessian, "output")
    monkeypatch.setattr(grids, "serves", lambda *args: False)
    wanted_scale, wanted_zero = fit(weight, grid, hessian, "output")

    def errors(scale, zero):
        read = dequantize(round_to_grid(weight, expand(scale, 3 * width), expand(zero, 3 * width), grid), scale, zero)
        apart = (read - weight).double().unflatten(1, (3, width))
        blocks = torch.stack([hessian.double()[i : i + width, i : i + width] for i in range(0, 3 * width, width)])
        return torch.einsum("rgi,gij,rgj->rg", apart, blocks, apart)

    # Errors are summed in another order, so that one of two candidates that are as good may be found.
    torch.testing.assert_close(errors(scale, zero), errors(wanted_scale, wanted_zero), rtol=1e-4, atol=0)
    assert ((scale == wanted_scale) & (zero == wanted_zero)).float().mean() > 0.9


def test_wide_groups_by_output_are_left_to_operations():
    weight = torch.randn(4, 1, 144)
    assert not grid_search.serves(weight, torch.ones(1, 144, 144))
    assert not grid_search.serves(weight[..., :36], torch.ones(1, 36, 36))
