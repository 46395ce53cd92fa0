"""Round-to-nearest: every weight to the closest code of its group's grid, without data.

The baseline of every weight-quantization paper (Dettmers et al., "LLM.int8()", 2022, section 2.1: absmax and
zero-point quantization; Yao et al., "ZeroQuant", 2022, section 3, adds groups). ``search: mse`` clips each group's
range to the one with the least squared error instead of covering its largest weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant_methods.formats.grid import Search, expand, fit, round_to_grid
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.handlers import LinearProblem, handles, register
from quant_methods.steps import RoundStep


@register("rtn")
@dataclass(frozen=True)
class RTN(RoundStep):
    """Round-to-nearest.

    Attributes:
        search: ``minmax`` covers the largest weight of each group, ``mse`` clips for the least squared error of the
            weights, ``output`` for that of the layer's output on calibration data.

    """

    search: Search = "mse"


@handles(RTN, needs_hessian=lambda step: step.search == "output")
def quantize(step: RTN, problem: LinearProblem) -> QuantizedLinear:
    """Round one layer; see ``handlers.LinearProblem``."""
    weight, grid = problem.weight, step.grid
    hessian = problem.hessian if step.search == "output" else None
    scale, zero = problem.ranges or fit(weight, grid, hessian, step.search, problem.scale_dtype)
    columns = weight.shape[1]
    codes = round_to_grid(weight, expand(scale, columns), expand(zero, columns), grid)
    scale, zero = scale.to(problem.scale_dtype), zero.to(torch.int8)
    return QuantizedLinear(GridCodes(codes.to(torch.int8), scale, zero, step.bits, step.symmetric))
