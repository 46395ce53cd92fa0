"""SqueezeLLM: every output channel has a look-up table of its own, and the few weights that hurt most stay apart.

Kim, Hooper, Gholami, Dong, Li, Shen, Mahoney, Keutzer: "SqueezeLLM: Dense-and-Sparse Quantization" (2023),
https://arxiv.org/abs/2306.07629. A table's entries are the centres of a k-means over the row's weights, each counted
by how sensitive the loss is to it: ``argmin_Q sum_j F_jj (w_j - Q(w_j))^2`` (Eq. 5, section 4.1). The weight is split
as ``W = D + S`` (section 4.2), S holding the fraction ``sparse`` of weights that codes would serve worst.

What differs from the paper:

- Its sensitivity F is the diagonal of the Fisher matrix, squared gradients of the loss, which takes a backward pass
  through the whole model. Here it is the diagonal of the layer's Hessian, ``H_jj = mean x_j^2``: it streams block by
  block, and within a row, where tables are fitted, the two differ only by how x_j^2 goes together with the gradient.
- S takes the weights with the largest ``F_jj (w_j - Q(w_j))^2`` under tables fitted without the likeliest of them; the
  paper takes the largest (outliers) and the most sensitive. S is what the codes there lack, not the weights themselves.
- ``feedback: true`` rounds to the tables by GPTQ's loop (``gptq.py``), so that channels absorb the error of those
  before them, and refits the tables to the codes: with A [columns, k] one-hot for a row's codes, the entries t with the
  least ``(w - A t)^T H (w - A t)`` solve ``A^T H A t = A^T H w``. Rounding and fitting alternate. GPTVQ (van Baalen et
  al., 2024, https://arxiv.org/abs/2402.15319, section 3.3) does the like for vector codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.formats.parts.table_codes import TableCodes
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.handlers import LinearProblem, handles, register
from quant_methods.methods.feedback import feed_back
from quant_methods.methods.gptq import UPSTREAM_DAMPING, aim, check_dampings, factorize, finite
from quant_methods.methods.kmeans import kmeans, nearest
from quant_methods.steps import RoundStep

# Elements of one-hot codes of rows that are fitted together: little new memory on a CPU, much work at once on a GPU.
ELEMENTS, ELEMENTS_GPU = 1 << 21, 1 << 26


@register("squeezellm")
@dataclass(frozen=True)
class SqueezeLLM(RoundStep):
    """SqueezeLLM.

    Attributes:
        group_size: -1: a table serves an output channel.
        sparse: fraction of the weights kept apart in 16 bits, each at the price of about 32 bits.
        feedback: round by GPTQ's loop, and refit tables to codes.
        refits: how often tables are refitted and codes rounded anew.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        upstream: make up for the error of the layers before.
        upstream_damping: see :func:`quant_methods.methods.gptq.aim`.

    """

    group_size: int = -1
    sparse: float = 0.0045
    feedback: bool = True
    refits: int = 2
    damping: float = 0.01
    upstream: bool = True
    upstream_damping: float = UPSTREAM_DAMPING
    table: ClassVar[bool] = True

    @property
    def plain(self) -> bool:
        """Whether the result is codes on a grid and nothing else: it is not."""
        return False

    def check(self) -> None:
        """Refuse settings that tables do not have, and fractions out of range."""
        super().check()
        if self.bits not in (2, 3, 4):
            raise ParetoError(f"squeezellm: bits: {self.bits}: tables have 2, 3 or 4 bits; use gptq for more")
        if self.group_size != -1 or not self.symmetric:
            raise ParetoError(
                "squeezellm: a table serves a whole output channel and has no zero-point; leave group_size and "
                "symmetric out"
            )
        if self.activations != "none":
            raise ParetoError("squeezellm: tables hold 16-bit numbers; leave activations at none")
        if not 0 <= self.sparse < 0.1:
            raise ParetoError(f"sparse: {self.sparse} is not in [0, 0.1); the paper's value is 0.0045")
        if self.refits < 0:
            raise ParetoError(f"refits: {self.refits} is negative; 2 is usual, and 0 keeps the tables of the k-means")
        check_dampings(self.damping, self.upstream_damping, "0.01 is usual")


@handles(SqueezeLLM, needs_hessian=lambda step: True, needs_upstream=lambda step: step.feedback and step.upstream)
def quantize(step: SqueezeLLM, problem: LinearProblem) -> QuantizedLinear:
    """Quantize one layer; see ``handlers.LinearProblem``.

    Raises:
        ParetoError: the Hessian is not finite.

    """
    given = finite(problem)
    weight = aim(problem, step.upstream_damping) if step.feedback else problem.weight
    hessian = factorize(given, step.damping)[0]
    dtype, clusters = problem.scale_dtype, 1 << step.bits
    # Not the damped one: where channels are kept apart, weights of 0 without inputs stand for them.
    sensitivity = given.diagonal().clamp(min=0).to(weight.dtype).expand_as(weight)
    apart = torch.zeros_like(weight, dtype=torch.bool)
    if count := round(step.sparse * weight.numel()):
        apart = _worst_served(weight, sensitivity, clusters, count)
    table = stored(kmeans(weight, sensitivity * ~apart, clusters), dtype)
    if step.feedback:
        codes, wanted, table = solve(weight, hessian, table, apart, refits=step.refits, dtype=dtype)
    else:
        codes, wanted = nearest(weight, table), weight
    linear = QuantizedLinear(TableCodes(codes.to(torch.int8), table.to(dtype)))
    return linear.having(_compress(wanted - table.gather(1, codes), apart, dtype)) if count else linear


def _worst_served(weight: Tensor, sensitivity: Tensor, clusters: int, count: int) -> Tensor:
    """Return a mask of the weights that tables without them would leave the most error in."""

    def top(score: Tensor, count: int) -> Tensor:
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask.view(-1)[score.flatten().topk(count).indices] = True
        return mask

    # The candidates do not count in the k-means: a single large weight would get an entry of its own, and no error.
    candidates = top(weight.square() * sensitivity, min(2 * count, weight.numel()))
    table = kmeans(weight, sensitivity * ~candidates, clusters)
    return top((weight - table.gather(1, nearest(weight, table))).square_() * sensitivity, count)


def stored(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a table rounded to the dtype that it is stored in, in its own dtype."""
    return table.to(dtype).to(table.dtype)


def solve(
    weight: Tensor, hessian: Tensor, table: Tensor, apart: Tensor, *, refits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to tables by GPTQ's loop and refit the tables, in turns, and keep the best of every row.

    Args:
        weight: [rows, columns] float32 or float64; the arithmetic runs in this dtype.
        hessian: float64 [columns, columns], damped so that it is positive definite.
        table: [rows, k] to begin with, rising.
        apart: bool [rows, columns], weights that are kept apart.
        refits: turns after the first.
        dtype: dtype that tables are stored in.

    Returns:
        (codes int64 [rows, columns]; weights [rows, columns], of which those kept apart are to be read back as they
        are here; tables [rows, k]).

    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    metric = hessian.to(weight.dtype)
    least = weight.new_full((len(weight), 1), torch.inf)
    best: tuple[Tensor, ...] = ()
    for _ in range(refits + 1):
        rounding = _Tables(table, apart[:, order].T.contiguous(), dtype)
        feed_back(weight, hessian, order, rounding)
        codes, wanted = torch.empty_like(weight, dtype=torch.int64), torch.empty_like(weight)
        codes[:, order], wanted[:, order] = rounding.codes.T.long(), rounding.wanted.T
        rounded = table
        table = stored(refit(weight, metric, codes, table, wanted, apart), dtype)
        for candidate in (rounded, table):
            error = weight - torch.where(apart, wanted, candidate.gather(1, codes))
            loss = ((error @ metric) * error).sum(1, keepdim=True)
            found = (codes, wanted, candidate)
            best = tuple(torch.where(loss < least, new, old) for new, old in zip(found, best or found, strict=True))
            least = torch.minimum(loss, least)
        table = table.sort(1).values
    return best[0], best[1], best[2]


class _Tables:
    """Rounds to tables, and keeps codes int8 and weights kept apart [columns, rows] in the order of rounding."""

    def __init__(self, table: Tensor, apart: Tensor, dtype: torch.dtype) -> None:
        self.table = table.T.contiguous()
        self.middles = (self.table[1:] + self.table[:-1]) / 2
        self.apart, self.dtype = apart, dtype
        self.codes = torch.empty(apart.shape, dtype=torch.int8, device=table.device)
        self.wanted = table.new_empty(apart.shape)

    def sees(self, position: int) -> int:
        return 0

    def fit(self, position: int, current: Tensor, pivots: Tensor) -> None:
        raise AssertionError("tables are fitted beforehand")

    def round(self, position: int, channel: Tensor) -> Tensor:
        code = (channel > self.middles).sum(0)
        entry = self.table.gather(0, code[None])[0]
        self.codes[position] = code
        self.wanted[position] = entry + stored(channel - entry, self.dtype)
        return torch.where(self.apart[position], self.wanted[position], entry)

    def round_block(self, work: Tensor, upper: Tensor, start: int, stop: int) -> None:
        return None


def refit(weight: Tensor, hessian: Tensor, codes: Tensor, table: Tensor, wanted: Tensor, apart: Tensor) -> Tensor:
    """Return the tables [rows, k] with the least ``(w - q)^T H (w - q)`` in every row, its codes given.

    Args:
        weight: [rows, columns].
        hessian: [columns, columns], in ``weight``'s dtype.
        codes: int64 [rows, columns].
        table: [rows, k], whose entries stay where a row uses none of their codes.
        wanted: [rows, columns], what weights kept apart read back as.
        apart: bool [rows, columns], which those are.

    """
    rows, clusters = table.shape
    fitted = torch.empty_like(table)
    step = max(1, (ELEMENTS_GPU if weight.is_cuda else ELEMENTS) // (clusters * weight.shape[1]))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        error = weight[part] - torch.where(apart[part], wanted[part], table[part].gather(1, codes[part]))
        chosen = torch.nn.functional.one_hot(codes[part], clusters).to(weight.dtype)  # [rows, columns, k]
        chosen = chosen.mul_(~apart[part][:, :, None]).transpose(1, 2).contiguous()
        product = chosen @ hessian
        normal = (product @ chosen.transpose(1, 2)).double()
        right = (product @ error[:, :, None]).double()
        normal.diagonal(dim1=1, dim2=2).add_(1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30)
        fitted[part] = table[part] + torch.linalg.solve(normal, right)[:, :, 0].to(table.dtype)
    return fitted


def _compress(values: Tensor, apart: Tensor, dtype: torch.dtype) -> Sparse:
    """Return the marked values in compressed rows."""
    starts = torch.nn.functional.pad(apart.sum(1).cumsum(0), (1, 0))
    return Sparse(starts.to(torch.int32), apart.nonzero()[:, 1].to(torch.int32), values[apart].to(dtype))
