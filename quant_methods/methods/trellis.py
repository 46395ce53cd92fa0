"""Codes weights by a trellis, a few input channels at a time, and lets the channels after them absorb the error.

Tseng, Sun, Hou, De Sa: "QTIP: Quantization with Trellises and Incoherence Processing" (2024),
https://arxiv.org/abs/2406.11235, with the feedback of blocks of QuIP# (Tseng et al., 2024,
https://arxiv.org/abs/2402.04396, section 4.1, "block LDLQ"). A tile's stream (``formats/parts/trellis.py``) codes 8
input channels of 32 output channels at once. With U the upper Cholesky factor of the inverse Hessian and E what a tile
leaves of the weights, the channels after it take ``-E U_bb^-1 U_b,later``: GPTQ's step (``gptq.py``) for a block b. The
search counts each channel's squared error by ``(U_bb^-1 U_bb^-T)_jj``, what it costs after that if the errors within a
block are independent, times the square of the row's scale.

What differs from the papers: no random rotation makes weights Gaussian; a scale for each group does, which costs 16 /
group size bits a weight and no arithmetic on activations. Blocks are coded in order of falling activations (GPTQ's
activation order), and when all streams are chosen, each row's scales are fitted to them: the least output error for the
streams is a linear problem of as many unknowns as the row has groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.part import BulkForm
from quant_methods.formats.parts.trellis import TILE_CHANNELS, TILE_ROWS, matrix_of, pair_values, tiles_of, words_of
from quant_methods.formats.parts.trellis_codes import BITS, TrellisCodes, TrellisForm
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.handlers import LinearProblem, handles, register
from quant_methods.kernels.trellis_search import search
from quant_methods.methods.feedback import inverse_factor
from quant_methods.methods.gptq import UPSTREAM_DAMPING, aim, check_dampings, factorize, finite
from quant_methods.steps import RoundStep

SPREAD = 1.1
"""Standard deviations of a group's weights in one of what states mean: less error on a Gaussian than the same."""
WIDER = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.4, 2.8, 3.4, 4.0, 5.0)
"""How much wider than that a group's scale may be, for the sake of its largest weights."""
REACH = 3.4
"""What streams reach without much more error around it; the largest value of a state is 3.97."""
ERROR = {2: 0.070, 3: 0.0182, 4: 0.0049}
"""Mean square error on a Gaussian of variance 1, by bits."""
LATER = 512
"""Channels after which errors are passed on to all later ones; changes speed, not the result."""


@register("trellis")
@dataclass(frozen=True)
class Trellis(RoundStep):
    """A trellis code.

    Attributes:
        bits: of a weight, 2 to 4.
        group_size: input channels that share a scale.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        upstream: make up for the error of the layers before.
        upstream_damping: see :func:`quant_methods.methods.gptq.aim`.
        refit: fit scales to the streams in the end.

    """

    group_size: int = 64
    damping: float = 0.1
    upstream: bool = True
    upstream_damping: float = UPSTREAM_DAMPING
    refit: bool = True

    @property
    def plain(self) -> bool:
        """Whether the result is codes on a grid and nothing else: it is not."""
        return False

    @property
    def bulk_form(self) -> BulkForm:
        """How the format of ours stores the streams."""
        return TrellisForm(self.bits, self.group_size)

    def check(self) -> None:
        """Refuse settings that a trellis does not have, and fractions out of range."""
        super().check()
        if self.bits not in BITS:
            raise ParetoError(f"trellis: bits: {self.bits}: a trellis has 2, 3 or 4 bits; use gptq for more")
        if not self.symmetric or self.per_tensor:
            raise ParetoError("trellis: a group has a scale and no zero-point; leave symmetric and per_tensor out")
        if self.activations != "none":
            raise ParetoError("trellis: weights are read as 16-bit numbers; leave activations at none")
        if self.outliers or self.rank:
            raise ParetoError("trellis: nothing lies beside the streams; leave outliers and rank out")
        check_dampings(self.damping, self.upstream_damping, "0.1 is usual")


@handles(Trellis, needs_hessian=lambda step: True, needs_upstream=lambda step: step.upstream)
def quantize(step: Trellis, problem: LinearProblem) -> QuantizedLinear:
    """Quantize one layer; see ``handlers.LinearProblem``.

    Raises:
        ParetoError: the Hessian is not finite.

    """
    weight = aim(problem, step.upstream_damping)
    hessian = factorize(finite(problem), step.damping)[0]
    return QuantizedLinear(
        solve(weight, hessian, step.bits, step.group_size, scale_dtype=problem.scale_dtype, refit=step.refit)
    )


def solve(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    refit: bool = True,
) -> TrellisCodes:
    """Code a weight.

    Args:
        weight: float32 [rows, columns]; 8 divides the columns.
        hessian: float64 [columns, columns], damped so that it is positive definite.
        bits: a weight.
        group_size: columns that share a scale; -1: all.
        scale_dtype: dtype that scales are stored in.
        refit: fit scales to the streams in the end.

    """
    given, columns = weight.shape
    # Rows that fill the last tiles are zeros, whose small scales let the search do without what they read as.
    weight = functional.pad(weight, (0, 0, 0, -given % TILE_ROWS))
    width = columns if group_size == -1 else group_size
    scale = first_scales(weight, bits, width).to(scale_dtype).to(weight.dtype)
    order = _order(hessian)
    # In one copy: each number asked of a GPU would wait for all of its work.
    blocks = order[::TILE_CHANNELS].tolist()
    upper = inverse_factor(hessian, order).to(weight.dtype)
    work = weight[:, order].T.contiguous()
    streams = torch.empty(
        (len(weight) // TILE_ROWS, columns // TILE_CHANNELS, 8 * bits), dtype=torch.int32, device=weight.device
    )
    pairs = torch.empty_like(weight)
    values = pair_values(weight.device)
    errors = torch.empty_like(work)
    for start in range(0, columns, LATER):
        stop = min(start + LATER, columns)
        for j in range(start, stop, TILE_CHANNELS):
            own = slice(j, j + TILE_CHANNELS)
            channel = blocks[j // TILE_CHANNELS]
            by = scale[:, channel // width, None]
            current = work[own].T
            inverse = torch.linalg.solve_triangular(
                upper[own, own], torch.eye(TILE_CHANNELS, dtype=upper.dtype, device=upper.device), upper=True
            )
            costs = inverse.square().sum(1) * by.square()
            found = search(_tiles(current / by), bits, _tiles(costs / costs.mean()))
            streams[:, channel // TILE_CHANNELS] = words_of(found, bits)
            read = matrix_of(values[found][:, None])
            pairs[:, channel : channel + TILE_CHANNELS] = read
            passed_on = (current - read * by) @ inverse
            errors[own] = passed_on.T
            work[j + TILE_CHANNELS : stop] -= upper[own, j + TILE_CHANNELS : stop].T @ errors[own]
        work[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    if refit:
        scale = fitted_scales(weight, pairs, hessian, width)
    return TrellisCodes(streams, scale[:given].to(scale_dtype))


def first_scales(weight: Tensor, bits: int, width: int) -> Tensor:
    """Return scales [rows, groups] by which to code a weight [rows, columns].

    Every weight has an error in proportion to its scale, and one beyond what the scale reaches has what is missing
    besides. Of some candidates the one is taken that costs least.

    """
    groups, spread = weight.abs().unflatten(1, (-1, width)), pair_values(weight.device).std()
    size = groups.square().mean(2).sqrt()
    # Of a group of zeros any scale is right whose pairs are small.
    size = torch.maximum(size, size.amax().clamp(min=1e-30) * 1e-4) * (SPREAD / spread)
    everywhere = width * ERROR[bits] * (spread / SPREAD).square()
    best, chosen = torch.full_like(size, torch.inf), size
    for wider in WIDER:
        scale = size * wider
        beyond = (groups - REACH * scale[:, :, None]).clamp_(min=0).square_().sum(2)
        cost = beyond + everywhere * scale.square()
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, scale, chosen)
    return chosen


def _order(hessian: Tensor) -> Tensor:
    """Return the columns in the order of coding, int64: blocks by falling activations, ties by their place."""
    blocks = hessian.diagonal().unflatten(0, (-1, TILE_CHANNELS))
    first = torch.argsort(blocks.sum(1), descending=True, stable=True) * TILE_CHANNELS
    return (first[:, None] + torch.arange(TILE_CHANNELS, device=hessian.device)).flatten()


def _tiles(matrix: Tensor) -> Tensor:
    """Return the pairs [tiles, 128, 2] of the tiles of 8 columns."""
    return tiles_of(matrix.contiguous())[:, 0].contiguous()


def fitted_scales(weight: Tensor, pairs: Tensor, hessian: Tensor, width: int) -> Tensor:
    """Return the scales with the least output error ``(w - q)^T H (w - q)`` of each row, float32 [rows, groups].

    Args:
        weight: [rows, columns].
        pairs: [rows, columns], what streams mean without scales.
        hessian: float64 [columns, columns].
        width: columns of a group.

    """
    metric, groups = hessian.to(weight.dtype), weight.shape[1] // width
    system = weight.new_empty((len(weight), groups, groups))
    wanted = ((weight @ metric) * pairs).unflatten(1, (groups, width)).sum(2)
    for group in range(groups):
        own = slice(group * width, (group + 1) * width)
        system[:, group] = ((pairs[:, own] @ metric[own]) * pairs).unflatten(1, (groups, width)).sum(2)
    return torch.linalg.solve(system.double(), wanted.double()).to(weight.dtype)
