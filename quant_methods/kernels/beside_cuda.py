"""What lies beside a layer's bulk, added to the bulk's result on a CUDA device: which kernels do it, in which order.

Input channels kept apart and a low-rank product are one launch of a Triton kernel (``beside_triton.py``), single
weights one of a CUDA kernel (``sparse_cuda.py``), for which with more than one token a small one turns inputs around.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quant_methods.kernels.beside import BesideParts
from quant_methods.kernels.sparse_cuda import add as add_sparse
from quant_methods.kernels.sparse_cuda import turn


def add_on_cuda(y: Tensor, x: Tensor, parts: BesideParts, bulk: Callable[[], None] | None = None) -> Tensor:
    """Return the bulk's result with what lies beside it; see :func:`quant_methods.kernels.beside.add_beside`.

    Sums are float32 and rounded once, or twice where there are both single weights and something else.

    Args:
        y: [tokens, out], 1 to 64 tokens.
        x: [tokens, in].
        parts: what is added.
        bulk: launches what writes y, after which the sum is written to y too; elements of a row of y then lie together.
            Its last kernel lets the next one start no sooner than all before it have ended: what does not need y is
            then done while it runs (sm_90 and above).

    """
    y, x = (part if part.stride(1) == 1 else part.contiguous() for part in (y, x))
    low = parts.low if parts.low is None or parts.low.stride(1) == 1 else parts.low.contiguous()
    turned = x
    if parts.starts is not None and len(x) > 1:
        # Before the bulk, which reads codes ahead while this runs.
        turned = turn(x)
    if bulk is not None:
        bulk()
    result = y if bulk is not None else None
    if parts.ends is not None:
        # An installation for CPUs may lack Triton.
        from quant_methods.kernels.beside_triton import add as add_dense

        y = result = add_dense(y, x, low, parts.channels, parts.ends, result)
    if parts.starts is not None:
        assert parts.inputs is not None
        assert parts.values is not None
        # The bulk's kernel, and the one before this, start the next one when all before them have ended, and so have
        # the inputs. With neither in between they may be what is still being written.
        early = result is not None
        result = y.new_empty(y.shape) if result is None else result
        add_sparse(y, turned, parts.starts, parts.inputs, parts.values, result, early=early)
    return y.clone() if result is None else result
