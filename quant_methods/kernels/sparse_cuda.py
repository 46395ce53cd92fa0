"""Adds single weights to a bulk's result while decoding on a CUDA device: the host's side of ``csrc/sparse.cu``.

``quant_methods.kernels.sparse.sparse_linear`` and an addition are its specification.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from kv_cache.cuda.runtime.device import device_limits
from kv_cache.cuda.runtime.launch import Kernel, compile_ahead, load_kernel
from kv_cache.doors import expect, in_line, is_table, is_vector
from quant_methods.kernels.low_bit_matrix import FOLDER

BOUNDS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of tokens that there are kernels for; others take the next larger one."""
OWN_WEIGHTS = 4
"""That a lane loads at once."""


class Arrangement(NamedTuple):
    """How a kernel shares its work.

    Attributes:
        warps: of a thread block, each with 4 output channels.
        gathers: of a lane that are under way at once.
        resident: thread blocks of a multiprocessor that registers are to suffice for.

    """

    warps: int
    gathers: int
    resident: int


DTYPES = (torch.bfloat16, torch.float16)
ARRANGEMENTS = {
    1: Arrangement(8, 4, 8),
    2: Arrangement(8, 4, 8),
    4: Arrangement(8, 4, 5),
    8: Arrangement(4, 8, 10),
    16: Arrangement(8, 4, 4),
    32: Arrangement(8, 4, 3),
    64: Arrangement(4, 8, 6),
}
"""By bound: the fastest of 8 to 12 on an H100, over the matrices of a layer of Mistral-7B's shape; 2 and 4 as 1."""
TURN_WARPS = 2
"""Of a thread block that turns inputs around, each with 32 channels of up to 8 tokens."""
LEAST_OWN, OWN_SHARE = 64, 2
"""An output channel's own lanes add so many of its weights, or so many times the mean; its block shares the rest."""

_i32, _i64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Params(ctypes.Structure):
    _fields_ = (
        ("y", _ptr),
        ("result", _ptr),
        ("x", _ptr),
        ("turned", _ptr),
        ("starts", _ptr),
        ("inputs", _ptr),
        ("values", _ptr),
        ("y_stride", _i64),
        ("result_stride", _i64),
        ("x_stride", _i64),
        ("tokens", _i32),
        ("rows", _i32),
        ("channels", _i32),
        ("own", _i32),
        ("early", _i32),
    )


def bound(tokens: int) -> int:
    """Return the tokens of the kernel for that many."""
    return next(most for most in BOUNDS if most >= tokens)


def macros(tokens: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """Return what the kernels for a number of tokens, one of ``BOUNDS``, are compiled with."""
    a = ARRANGEMENTS[tokens]
    return (
        ("TOKENS", tokens), ("IN_BFLOAT", int(dtype == torch.bfloat16)), ("WARPS", a.warps), ("OWN", OWN_WEIGHTS),
        ("GATHERS", a.gathers), ("RESIDENT", a.resident), ("TURN_WARPS", TURN_WARPS), ("BULK_COPY", 0),
        ("PARAMS_BYTES", ctypes.sizeof(_Params)),
    )  # fmt: skip


def prepare(dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load the kernels, so that nothing waits for it, or does it while a graph is captured."""
    compile_ahead("sparse.cu", [macros(tokens, dtype) for tokens in BOUNDS], device, FOLDER)
    for tokens in BOUNDS:
        for name in ("sparse", "turn") if tokens > 1 else ("sparse",):
            _kernel(name, tokens, dtype, device)


def _kernel(name: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    return load_kernel("sparse.cu", name, macros(tokens, dtype), device, folder=FOLDER)


def turn(x: Tensor) -> Tensor:
    """Return inputs turned around, for :func:`add`.

    The next kernel may start before this one ends; whatever it is, it has to wait for this one by itself.

    Args:
        x: [tokens, in] bfloat16 or float16, 2 to 64 tokens; elements of a row lie together.

    Returns:
        [in + 1, tokens' bound], contiguous, with zeros for tokens that are not there, and as the last channel.

    """
    expect(
        "the kernel of single weights",
        (
            (x.dtype in DTYPES, f"16-bit inputs, not {x.dtype}"),
            (x.dim() == 2 and in_line(x), "inputs [tokens, in] whose rows have no gaps"),
            (1 < len(x) <= BOUNDS[-1], f"2 to {BOUNDS[-1]} tokens to turn around, not {len(x)}"),
        ),
    )
    (tokens, channels), most = x.shape, bound(x.shape[0])
    turned = x.new_empty(channels + 1, most)
    params = _Params(x=x.data_ptr(), turned=turned.data_ptr(), x_stride=x.stride(0), tokens=tokens, channels=channels)
    blocks = -(-(-(-(channels + 1) // 32) * max(most // 8, 1)) // TURN_WARPS)
    overlap = device_limits(x.device)[2]
    _kernel("turn", most, x.dtype, x.device).launch((blocks, 1, 1), 32 * TURN_WARPS, params, x.device, overlap)
    return turned


def add(
    y: Tensor,
    x: Tensor,
    starts: Tensor,
    inputs: Tensor,
    values: Tensor,
    result: Tensor,
    *,
    early: bool,
) -> None:
    """Write y and the products with single weights to the result.

    Args:
        y: [tokens, out] bfloat16 or float16, as all floating-point numbers here; rows' elements lie together.
        x: inputs as :func:`turn` returns them; for one token the inputs themselves, [1, in].
        starts: int32 [out + 1], where each output channel's weights begin.
        inputs: int32 [n], their input channels.
        values: [n], the weights.
        result: [tokens, out], rows' elements lie together; it may be y.
        early: whether only y may be missing when the kernel before this one lets the next one start. All that it has
            not written itself is then complete.

    """
    most = bound(y.shape[0])
    expect(
        "the kernel of single weights",
        (
            (y.dtype in DTYPES and y.dtype == x.dtype == values.dtype == result.dtype, "16-bit numbers of one dtype"),
            (y.dim() == 2 and in_line(y) and in_line(result), "outputs [tokens, out] whose rows have no gaps"),
            (result.shape == y.shape, "a result of the shape of what is added to"),
            (is_table(x, x.dtype) and (most == 1 or (x.is_contiguous() and x.shape[1] == most)), "turned inputs"),
            (is_vector(starts, torch.int32) and len(starts) == y.shape[1] + 1, f"int32 starts [{y.shape[1] + 1}]"),
            (is_vector(inputs, torch.int32) and len(inputs) == len(values), "an int32 channel for each weight"),
            (is_vector(values, values.dtype), "weights without gaps"),
            (all(t.device == y.device for t in (x, starts, inputs, values, result)), f"tensors on {y.device}"),
        ),
    )
    tokens, rows = y.shape
    channels = x.shape[1] if most == 1 else x.shape[0] - 1
    own = max(LEAST_OWN, -(-OWN_SHARE * len(values) // rows))
    params = _Params(
        y.data_ptr(), result.data_ptr(), x.data_ptr(), x.data_ptr(), starts.data_ptr(), inputs.data_ptr(),
        values.data_ptr(), y.stride(0), result.stride(0), 0, tokens, rows, channels, own, int(early),
    )  # fmt: skip
    warps, overlap = ARRANGEMENTS[most].warps, device_limits(y.device)[2]
    blocks = -(-rows // (4 * warps))
    _kernel("sparse", most, y.dtype, y.device).launch((blocks, 1, 1), 32 * warps, params, y.device, overlap)
