"""What prune steps make zero against a few lines of float64, and SparseGPT's weights against one inverse a channel."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from quant_methods.checkpoints.checkpoint import pack_linear, unpack_linear
from quant_methods.formats.form import Form
from quant_methods.formats.grid import Grid, dequantize, expand, round_to_grid
from quant_methods.formats.native_format import pack, unpack
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.handlers import HANDLERS, PRUNERS, LinearProblem
from quant_methods.methods.gptq import GPTQ, factorize
from quant_methods.methods.pruning import Magnitude, Wanda
from quant_methods.methods.rtn import RTN
from quant_methods.methods.sparsegpt import SparseGPT, prune_and_round
from quant_methods.steps import PruneStep, RoundStep
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


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    step: SparseGPT,
    dead: list[int],
    rounded: Callable[[int, torch.Tensor], torch.Tensor] = lambda j, left: left,
) -> torch.Tensor:
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
        found = rounded(j, weight[:, j] * ~mask[:, j])
        error = weight[:, j] - found
        weight[:, j:] -= error[:, None] / inverse[j][0, 0] * inverse[j][0]
        weight[:, j] = found
    return weight


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


def of_few_factors(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and the Hessian of inputs that a quarter as many factors explain for the most part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = normal(2000, columns // 4) @ normal(columns // 4, columns) + 0.5 * normal(2000, columns)
    inputs = inputs * torch.exp(0.5 * normal(columns))
    return normal(rows, columns), inputs.T @ inputs / 2000


@pytest.mark.parametrize("settings", [{}, {"pattern": "2:4"}, {"pattern": "4:8"}], ids=str)
def test_what_is_lost_on_correlated_inputs_falls_from_method_to_method(settings: dict[str, str]) -> None:
    for seed in range(3):
        weight, hessian = of_few_factors(64, 256, seed)

        def lost(step: PruneStep, weight: torch.Tensor = weight, hessian: torch.Tensor = hessian) -> float:
            error = prune(step, as_double(weight, hessian)) - weight
            return ((error @ hessian) * error).sum().sqrt().item()

        magnitude, wanda, sparse = lost(Magnitude(**settings)), lost(Wanda(**settings)), lost(SparseGPT(**settings))
        assert sparse < 0.9 * wanda < 0.9 * 0.9 * magnitude


LAYOUTS = [
    {"bits": bits, "group_size": group, "symmetric": symmetric}
    for bits, group, symmetric in (
        (2, 32, False), (3, 64, False), (4, 128, False), (4, 32, True), (5, -1, False), (6, 64, True), (7, 128, False),
        (8, -1, True), (8, 32, False),
    )
]  # fmt: skip
ROUNDINGS = [
    *(RTN(**layout, search=search) for layout in LAYOUTS for search in ("mse", "minmax")),
    *(GPTQ(**layout, act_order=act_order) for layout in LAYOUTS for act_order in (True, False)),
    GPTQ(bits=4, group_size=-1, per_tensor=True),
    GPTQ(bits=4, group_size=64, symmetric=False, search="output"),
    RTN(bits=8, group_size=-1, activations="int8"),
]


@pytest.mark.parametrize("step", ROUNDINGS, ids=lambda s: f"{s.method}-{s.bits}-{s.group_size}-{s.symmetric}")
@pytest.mark.parametrize("sign", [0, 1, -1], ids=["both signs", "positive", "negative"])
def test_zeros_survive_rounding_in_every_layout(step: RoundStep, sign: int) -> None:
    weight, hessian = correlated(32, 256, seed=2)
    if sign:
        # Far from zero, so that a grid that covers the weights alone would not have one.
        weight = sign * (weight.abs() + 3)
    given = as_problem(weight, hessian, residual=torch.randn(32, 256) * hessian.float().diagonal())
    pruned = prune(Wanda(pattern="2:4"), given)
    linear = HANDLERS[type(step)].quantize(step, dataclasses.replace(given, weight=pruned, dense=given.weight))
    zeros = pruned == 0
    grid = linear.part(GridCodes)
    assert torch.equal(grid.codes[zeros], expand(grid.zero_point, 256)[zeros]), "the zero-point is a code of the grid"
    form = Form((step.bulk_form,))
    stored = [unpack("layer", {n.removeprefix("layer."): t for n, t in pack("layer", linear).items()}, form)]
    if step.bits in (4, 8):
        stored.append(unpack_linear("layer", pack_linear("layer", linear, step), step.grid))
    for read in (linear, *stored):
        assert (read.read()[zeros] == 0).all()
        assert (read.read()[~zeros] != 0).double().mean() > 0.5


def test_gptq_makes_up_for_what_pruning_lost() -> None:
    weight, hessian = of_few_factors(64, 256, 0)
    given = as_double(weight, hessian)

    def lost(found: torch.Tensor) -> float:
        return (((found - weight) @ hessian) * (found - weight)).sum().sqrt().item()

    pruned = prune(Wanda(), given)
    both = dataclasses.replace(given, weight=pruned, dense=weight)
    settings = {"bits": 4, "group_size": 64, "symmetric": False}
    nearest = HANDLERS[RTN].quantize(RTN(**settings), both).read()
    fed_back = HANDLERS[GPTQ].quantize(GPTQ(**settings), both).read()
    assert lost(fed_back) < 0.9 * lost(pruned) < lost(nearest)


@pytest.mark.parametrize(
    ("columns", "settings", "group"),
    [(160, {}, 32), (256, {}, 64), (192, {"pattern": "2:4"}, 64), (200, {"pattern": "4:8"}, -1), (77, {}, -1)],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_pass_prunes_and_rounds_as_the_papers_does(
    columns: int, settings: dict[str, str], group: int, symmetric: bool
) -> None:
    weight, hessian = correlated(9, columns, seed=columns)
    step = SparseGPT(bits=4, group_size=group, symmetric=symmetric, damping=0.01, **settings)
    assert step.rounding is not None
    linear = prune_and_round(step, step.rounding, as_double(weight, hessian))
    grid = linear.part(GridCodes)
    scale, zero = (expand(part.double(), columns) for part in (grid.scale, grid.zero_point))

    def rounded(j: int, left: torch.Tensor) -> torch.Tensor:
        codes = round_to_grid(left, scale[:, j], zero[:, j], Grid(4, group, symmetric))
        return (codes - zero[:, j]) * scale[:, j]

    expected = sparsegpt(weight, factorize(hessian, 0.01)[0], step, [], rounded)
    assert torch.allclose(dequantize(grid.codes, grid.scale, grid.zero_point).double(), expected, rtol=1e-6)
    if step.kept_among:
        kept, among = step.kept_among
        assert ((linear.read().unflatten(1, (-1, among)) != 0).sum(-1) <= kept).all()
    else:
        assert (linear.read() == 0).double().mean() >= 0.49


def test_one_pass_loses_less_than_rounding_after_pruning() -> None:
    for seed in range(3):
        weight, hessian = of_few_factors(64, 256, seed)
        given = as_double(weight, hessian)
        joint = SparseGPT(pattern="2:4", bits=4, group_size=64, symmetric=False)
        assert joint.rounding is not None
        pruned = prune(SparseGPT(pattern="2:4"), given)
        nearest = RTN(bits=4, group_size=64, symmetric=False)

        def lost(found: torch.Tensor, weight: torch.Tensor = weight, hessian: torch.Tensor = hessian) -> float:
            return (((found - weight) @ hessian) * (found - weight)).sum().sqrt().item()

        together = lost(prune_and_round(joint, joint.rounding, given).read())
        after = lost(HANDLERS[RTN].quantize(nearest, dataclasses.replace(given, weight=pruned, dense=weight)).read())
        assert lost(pruned) < together < 0.98 * after
