"""Products of many tokens with 2:4 weights in 16 bits, on the sparse tensor cores by NVIDIA's cuSPARSELt.

Half of the multiplications are left out, so that a product of many tokens, which arithmetic limits, takes less time
than a dense one. The weight is compressed to cuSPARSELt's layout in each call, as codes are what lies in memory; so few
tokens do not repay it. Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021),
https://arxiv.org/abs/2104.08378.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from kv_cache.doors import expect

MIN_TOKENS = 2048
"""With fewer, compression takes more time than is gained."""
MULTIPLE = 16
"""Of both of a product's other sizes: rows, and tokens after padding (cuSPARSELt, 16-bit numbers)."""
CHANNELS = 32
"""Input channels come in multiples of so many."""


@functools.cache
def available() -> bool:
    """Return whether PyTorch was built with cuSPARSELt and the device has sparse tensor cores."""
    return torch.backends.cusparselt.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def serves(x: Tensor, rows: int) -> bool:
    """Return whether a product of these inputs [tokens, in] with so many output channels is made here.

    Not while a CUDA graph is captured, since the library sets up its plan on the host in each call.
    """
    return (
        x.is_cuda
        and x.shape[0] >= MIN_TOKENS
        and rows % MULTIPLE == 0
        and x.shape[1] % CHANNELS == 0
        and available()
        and not torch.cuda.is_current_stream_capturing()
    )


def semi_sparse_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [tokens, out] for a weight of which two in each four neighbours of a row are zero.

    Args:
        x: [tokens, in] bfloat16 or float16.
        weight: [out, in] in the dtype of x, contiguous; 16 divides out and 32 divides in. Four neighbours with more
            than two numbers that are not zero are not seen: the product is then wrong.

    """
    expect(
        "a product with 2:4 weights",
        (
            (x.dtype == weight.dtype, "inputs and weights of one dtype"),
            (x.shape[1] == weight.shape[1], "as many inputs as the weight has"),
            (weight.shape[0] % MULTIPLE == 0, f"output channels in multiples of {MULTIPLE}"),
            (weight.shape[1] % CHANNELS == 0, f"input channels in multiples of {CHANNELS}"),
            (weight.is_contiguous(), "a contiguous weight"),
        ),
    )
    tokens = x.shape[0]
    padded = functional.pad(x, (0, 0, 0, -tokens % MULTIPLE)).contiguous()
    y = torch._cslt_sparse_mm(torch._cslt_compress(weight), padded.T, transpose_result=True)
    return y[:tokens]
