"""What lies beside a layer's bulk (kept columns, a low-rank product, single weights), added to the bulk's result.

For bulks of vLLM's there is one operator, ``pareto::add_beside``: which way it goes depends on the device and the
number of tokens, and compilers should not look inside. While decoding on CUDA each of PyTorch's operations on so little
costs more to launch than to run; there a few kernels do it all (``beside_cuda.py``). The operator of our own bulk does
both (``low_bit_cuda.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.parts.part import Addition
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.kernels.sparse import add_sparse, sparse_linear

FUSED_TOKENS = 64
"""Up to so many tokens the kernels do it, on CUDA."""


class BesideParts(NamedTuple):
    """What is added for some inputs.

    Attributes:
        low: [tokens, rank], inputs that have gone through the first matrix of a low-rank product, or None. All
            floating-point numbers have the dtype of inputs and outputs.
        channels: int32 [k], input channels kept apart, or None.
        ends: [k + rank, out], contiguous: weights of the channels kept apart, then of the low-rank product; None if
            there is neither.
        starts: int32 [out + 1], where each output channel's single weights begin, or None.
        inputs: int32 [n], their input channels.
        values: [n], the weights.

    """

    low: Tensor | None = None
    channels: Tensor | None = None
    ends: Tensor | None = None
    starts: Tensor | None = None
    inputs: Tensor | None = None
    values: Tensor | None = None

    @property
    def kept(self) -> int:
        """Input channels kept apart."""
        return 0 if self.channels is None else len(self.channels)

    def low_rank(self) -> Tensor:
        """Return the second matrix of the low-rank product, [rank, out]."""
        assert self.ends is not None
        return self.ends[self.kept :]


class Beside(nn.Module):
    """Adds to products with a layer's bulk.

    Args:
        parts: what is added: columns, a low-rank product and single weights, or some of these.
        dtype: 16-bit dtype of inputs and outputs.

    Raises:
        ParetoError: it is none of these.

    """

    def __init__(self, parts: Sequence[Addition], dtype: torch.dtype) -> None:
        super().__init__()
        if others := [part.what for part in parts if not isinstance(part, Columns | LowRank | Sparse)]:
            raise ParetoError(f"{others[0]}: the kernels beside a bulk add columns, low-rank products, single weights")
        columns = next((part for part in parts if isinstance(part, Columns)), None)
        low_rank = next((part for part in parts if isinstance(part, LowRank)), None)
        sparse = next((part for part in parts if isinstance(part, Sparse)), None)
        ends = [] if columns is None else [columns.read()]
        ends += [] if low_rank is None else [low_rank.up]
        tensors = {
            "index": None if columns is None else columns.index.int(),
            "down": None if low_rank is None else low_rank.down.to(dtype).contiguous(),
            "ends": torch.cat([end.to(dtype) for end in ends], 1).T.contiguous() if ends else None,
            "starts": None if sparse is None else sparse.starts,
            "inputs": None if sparse is None else sparse.columns,
            "values": None if sparse is None else sparse.values.to(dtype),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the layer's product [tokens, out] from the bulk's and the inputs [tokens, in]."""
        result: Tensor = add_beside(y, x, list(self.parts(x)))
        return result

    def parts(self, x: Tensor) -> BesideParts:
        """Return what is to be added for the inputs [tokens, in]."""
        low = None if self.down is None else nn.functional.linear(x, self.down)
        return BesideParts(low, self.index, self.ends, self.starts, self.inputs, self.values)

    def prepare(self, width: int, product: Callable[[Tensor], Tensor] | None = None) -> None:
        """Compile and load what decoding needs, so that nothing waits for it, or does it while a graph is captured.

        Args:
            width: input channels.
            product: what will do this and multiply by the bulk at once, if anything will.

        """
        of = self.ends if self.values is None else self.values
        if not of.is_cuda:
            return
        if self.values is not None:
            from quant_methods.kernels.sparse_cuda import prepare

            prepare(self.values.dtype, self.values.device)
        if self.ends is not None:
            from quant_methods.kernels.beside_triton import TOKENS

            for tokens in (1, *TOKENS):
                x = of.new_zeros(tokens, width)
                self(of.new_zeros(tokens, self.ends.shape[1]), x) if product is None else product(x)


@torch.library.custom_op("pareto::add_beside", mutates_args=())
def add_beside(y: Tensor, x: Tensor, beside: list[Tensor | None]) -> Tensor:
    """Return the bulk's result with what lies beside it added.

    Args:
        y: [tokens, out] bfloat16 or float16, the bulk's result.
        x: [tokens, in] in the same dtype.
        beside: what is added, the fields of :class:`BesideParts`.

    Returns:
        [tokens, out] in the dtype of y. The kernels sum in float32; each of up to two rounds once.

    """
    parts = BesideParts(*beside)
    if y.is_cuda and 0 < len(y) <= FUSED_TOKENS:
        from quant_methods.kernels.beside_cuda import add_on_cuda

        return add_on_cuda(y, x, parts)
    return add_beside_in_torch(y, x, parts)


@add_beside.register_fake
def _(y: Tensor, x: Tensor, beside: list[Tensor | None]) -> Tensor:
    return y.new_empty(y.shape)


def add_beside_in_torch(y: Tensor, x: Tensor, parts: BesideParts) -> Tensor:
    """Do as :func:`add_beside` says, in plain PyTorch; a contiguous tensor of its own, if anything is added."""
    begun = [] if parts.channels is None else [x.index_select(1, parts.channels)]
    begun += [] if parts.low is None else [parts.low]
    if begun:
        assert parts.ends is not None
        y = torch.addmm(y, torch.cat(begun, 1) if len(begun) > 1 else begun[0], parts.ends)
    if parts.starts is not None:
        assert parts.inputs is not None
        assert parts.values is not None
        y = y + sparse_linear(x, parts.starts, parts.inputs, parts.values)
    return y


def add_to_weight(weight: Tensor, first: int, parts: BesideParts) -> None:
    """Add channels kept apart and single weights, but no low-rank product, to rows of a layer's weight, in place.

    Args:
        weight: [rows, in], contiguous.
        first: the output channel that its first row is of.
        parts: what lies beside.

    """
    if weight.is_cuda and not (parts.channels is None and parts.starts is None):
        from quant_methods.kernels.beside_triton import merge  # Triton, which an installation for CPUs may lack.

        merge(weight, first, parts)
    else:
        add_to_weight_in_torch(weight, first, parts)


def add_to_weight_in_torch(weight: Tensor, first: int, parts: BesideParts) -> None:
    """Do as :func:`add_to_weight` says, in plain PyTorch."""
    if parts.channels is not None:
        assert parts.ends is not None
        weight.index_add_(1, parts.channels, parts.ends[: parts.kept, first : first + len(weight)].T)
    if parts.starts is not None:
        assert parts.inputs is not None
        assert parts.values is not None
        add_sparse(weight, first, parts.starts, parts.inputs, parts.values)
