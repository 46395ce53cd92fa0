"""SqueezeLLM: tables against round-to-nearest, GPTQ's updates and the normal equations in float64."""

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.handlers import LinearProblem
from quant_methods.methods.feedback import feed_back
from quant_methods.methods.gptq import GPTQ, factorize, relative_error
from quant_methods.methods.gptq import quantize as gptq
from quant_methods.methods.rtn import RTN
from quant_methods.methods.rtn import quantize as round_to_nearest
from quant_methods.methods.squeezellm import SqueezeLLM, _Tables, quantize, refit
from quant_methods.recipe_file import parse_recipe


def given(rows: int = 48, columns: int = 256, seed: int = 0) -> LinearProblem:
    """A layer with heavy-tailed weights and correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(2000, columns, generator=generator) @ mix
    inputs *= torch.exp(torch.randn(columns, generator=generator))
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight * weight.abs()
    return LinearProblem("layer", weight, inputs.T @ inputs / 2000, None, None, torch.bfloat16)


def error(problem: LinearProblem, step: SqueezeLLM) -> float:
    return relative_error(problem.weight, quantize(step, problem), problem.hessian)


@pytest.mark.parametrize("bits", [3, 4])
def test_each_part_lowers_the_output_error(bits: int) -> None:
    problem = given()
    rounded = round_to_nearest(RTN(bits=bits, group_size=-1, symmetric=False), problem)
    grid = relative_error(problem.weight, rounded, problem.hessian)
    solved = gptq(GPTQ(bits=bits, group_size=-1, symmetric=False), problem)
    tables = error(problem, SqueezeLLM(bits=bits, sparse=0, feedback=False))
    sparse = error(problem, SqueezeLLM(bits=bits, sparse=0.01, feedback=False))
    fed_back = error(problem, SqueezeLLM(bits=bits, sparse=0, refits=0))
    refitted = error(problem, SqueezeLLM(bits=bits, sparse=0, refits=3))
    everything = error(problem, SqueezeLLM(bits=bits, sparse=0.01))
    assert tables < 0.75 * grid
    assert sparse < 0.95 * tables
    assert fed_back < 0.9 * tables
    assert fed_back < 0.75 * relative_error(problem.weight, solved, problem.hessian)
    assert refitted < fed_back
    assert everything < 0.95 * refitted


def test_without_feedback_every_weight_has_its_nearest_entry() -> None:
    problem = given()
    result = quantize(SqueezeLLM(bits=3, sparse=0, feedback=False), problem)
    bulk = result.part(TableCodes)
    assert bulk.table.shape == (48, 8)
    assert bulk.table.dtype == torch.bfloat16
    distance = (problem.weight[:, :, None] - bulk.table.float()[:, None, :]).abs()
    chosen = distance.gather(2, bulk.codes.long()[:, :, None])[:, :, 0]
    assert torch.equal(chosen, distance.amin(2))


def test_weights_kept_apart_are_those_that_tables_serve_worst() -> None:
    problem = given()
    problem.weight[7, 30] = 40.0
    problem.hessian = torch.eye(256)
    result = quantize(SqueezeLLM(bits=3, sparse=0.002, feedback=False), problem)
    sparse = result.part(Sparse)
    assert len(sparse.values) == round(0.002 * problem.weight.numel())
    places = set(zip(sparse.rows().tolist(), sparse.columns.tolist(), strict=True))
    assert (7, 30) in places
    read = result.read()
    for row, column in places:
        assert read[row, column].item() == pytest.approx(problem.weight[row, column].item(), rel=2**-8)


def test_the_loop_is_gptqs_update_in_float64() -> None:
    problem = given(rows=5, columns=40, seed=3)
    hessian, _ = factorize(problem.hessian.double() + 0.1 * torch.eye(40), 0.01)
    weight = problem.weight.double()
    table = torch.randn(5, 8, dtype=torch.float64).sort(1).values
    apart = torch.rand(5, 40) < 0.1
    order = torch.randperm(40)
    rounding = _Tables(table, apart[:, order].T.contiguous(), torch.float64)
    feed_back(weight, hessian, order, rounding)
    work, left = weight.clone(), order.tolist()
    while left:
        j, inverse = left[0], torch.linalg.inv(hessian[left][:, left])
        code = (work[:, j, None] - table).abs().argmin(1)
        assert torch.equal(rounding.codes[40 - len(left)].long(), code)
        value = torch.where(apart[:, j], work[:, j], table.gather(1, code[:, None])[:, 0])
        assert torch.allclose(rounding.wanted[40 - len(left)], work[:, j])
        work[:, left] -= ((work[:, j] - value) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]


def test_refitted_tables_solve_the_normal_equations() -> None:
    problem = given(rows=6, columns=64, seed=4)
    hessian, weight = problem.hessian.double(), problem.weight.double()
    table = torch.randn(6, 4, dtype=torch.float64).sort(1).values
    codes = torch.randint(0, 3, (6, 64))  # entry 3 is never used
    apart = torch.rand(6, 64) < 0.1
    wanted = weight + 0.1 * torch.randn(6, 64, dtype=torch.float64)
    found = refit(weight, hessian, codes, table, wanted, apart)
    assert torch.equal(found[:, 3], table[:, 3])
    for row in range(6):
        chosen = torch.nn.functional.one_hot(codes[row], 4)[:, :3].double() * ~apart[row][:, None]
        target = weight[row] - wanted[row] * apart[row]
        normal = chosen.T @ hessian @ chosen
        expected = torch.linalg.solve(normal, chosen.T @ hessian @ target)
        assert torch.allclose(found[row, :3], expected, rtol=1e-3, atol=1e-4)


def test_channels_without_input_do_no_harm() -> None:
    problem = given()
    assert problem.hessian is not None
    problem.hessian[[3, 9]] = 0
    problem.hessian[:, [3, 9]] = 0
    result = quantize(SqueezeLLM(), problem)
    assert torch.isfinite(result.read()).all()
    problem.hessian[5, 5] = torch.inf
    with pytest.raises(ParetoError, match="layer: the calibration activations are not finite"):
        quantize(SqueezeLLM(), problem)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "tables have 2, 3 or 4 bits"),
        ({"group_size": 128}, "a table serves a whole output channel"),
        ({"sparse": 0.5}, r"sparse: 0.5 is not in \[0, 0.1\)"),
        ({"activations": "int8"}, "leave activations at none"),
        ({"refits": -1}, "refits: -1 is negative"),
    ],
)
def test_bad_settings_are_one_clear_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ParetoError, match=message):
        parse_recipe({"name": "x", "steps": [{"method": "squeezellm", **settings}]})
