"""A compressed model in training: codes stay as they are, what is continuous beside them learns.

Everything that learns is a stored tensor, and the model always computes with the values that the file would hold:
gradients pass through that rounding as if it were not there (the straight-through estimator; Bengio, Léonard,
Courville 2013, https://arxiv.org/abs/1308.3432), and through the rounding of activations likewise. So the loss during
training is the loss of the checkpoint that would be written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from quant_methods.formats.grid import Grid, expand, round_tokens
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import QuantizedLinear

# How far from a code, in steps of the grid, a place starts that rounds to it.
WITHIN = 0.49


class _Straight(torch.autograd.Function):
    """A rounding whose gradient is that of the identity, or zero where ``inside`` says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``rounding(x)`` in x's dtype, with the gradient of x."""
    return _Straight.apply(x, rounding)


class Learned(nn.Module):
    """A stored tensor that learns: its start plus an offset, rounded to the dtype that it is stored in.

    The offset counts in units of the mean size of the tensor's last dimension, so that one learning rate, a relative
    one, fits scales, tables and norms alike.

    Args:
        start: the tensor as stored.

    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.dtype = start.dtype
        base = start.float()
        unit = base.abs().mean(-1, keepdim=True)
        self.register_buffer("start", base)
        self.register_buffer("unit", torch.where(unit > 0, unit, torch.ones_like(unit)))
        self.offset = nn.Parameter(torch.zeros_like(base))

    def forward(self) -> Tensor:
        """Return the tensor, float32."""
        return straight(self.start + self.unit * self.offset, lambda x: x.to(self.dtype).to(x.dtype))

    def stored(self) -> Tensor:
        """Return the tensor as it is to be stored."""
        return self.forward().detach().to(self.dtype)


class LearnedCodes(nn.Module):
    """Codes that learn: each is the rounding of a place on the grid, which moves.

    It starts where the original weight lies, as far as that rounds to the code: weights near the middle between two
    codes flip first. (Started from the codes themselves, all would flip at once, Adam's steps being alike.)

    Args:
        bulk: a layer's codes on a grid.
        grid: the grid.
        weight: float32 [out, in], the original.
        kept: bool [out, in], of a pruned layer the codes that may move; None: all may.

    """

    def __init__(self, bulk: GridCodes, grid: Grid, weight: Tensor, kept: Tensor | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("kept", kept)
        columns = weight.shape[1]
        place = weight / expand(bulk.scale.float(), columns) + expand(bulk.zero_point.float(), columns)
        self.register_buffer("start", bulk.codes)
        self.offset = nn.Parameter((place - bulk.codes).clamp(-WITHIN, WITHIN))

    def forward(self) -> Tensor:
        """Return the codes, float32; where a code is held at the end of the grid, it has no gradient."""
        offset = self.offset if self.kept is None else self.offset * self.kept
        return straight(self.start + offset, torch.round).clamp(self.grid.low, self.grid.high)

    def stored(self) -> Tensor:
        """Return the codes, int8."""
        return self.forward().detach().to(torch.int8)


class TunedLinear(nn.Module):
    """A quantized linear layer in training.

    Args:
        linear: the layer, on the device.
        bias: [out] or None.
        activation_bits: bits that inputs are rounded to, per token, or None.
        codes: what the codes become if they shall learn too, else None.

    """

    def __init__(
        self,
        linear: QuantizedLinear,
        bias: Tensor | None,
        activation_bits: int | None,
        codes: LearnedCodes | None = None,
    ) -> None:
        super().__init__()
        self.linear, self.activation_bits = linear, activation_bits
        self.parts = nn.ModuleDict()
        for part in linear.parts:
            for name in part.learns:
                tensor = getattr(part, name)
                if tensor is not None and tensor.is_floating_point() and tensor.numel():
                    self.parts[f"{part.kind}/{name}"] = Learned(tensor)
        self.codes = codes
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for inputs [..., in]."""
        linear, bits = self._with(lambda learned: learned()), self.activation_bits
        if bits is None:
            return functional.linear(x, linear.read(), self.bias)
        # As serving does: inputs are rounded for the bulk alone, without the columns kept apart.
        bulk, apart = linear.read_bulk(), linear.apart()
        entering = x if apart is None else x.index_fill(-1, apart, 0)
        out = functional.linear(straight(entering, lambda x: round_tokens(x, bits)), bulk, self.bias)
        return out + functional.linear(x, linear.read() - bulk) if linear.additions else out

    def stored(self) -> QuantizedLinear:
        """Return the layer as it is to be stored."""
        return self._with(lambda learned: learned.stored())

    def _with(self, value: Callable[[Any], Tensor]) -> QuantizedLinear:
        values: dict[str, dict[str, Tensor]] = {part.kind: {} for part in self.linear.parts}
        for path, learned in self.parts.items():
            kind, name = path.split("/")
            values[kind][name] = value(learned)
        if self.codes is not None:
            values[self.linear.bulk.kind]["codes"] = value(self.codes)
        changed = [dataclasses.replace(part, **values[part.kind]) for part in self.linear.parts]
        return QuantizedLinear(*changed, input_scale=self.linear.input_scale)


def learn_parameter(module: nn.Module, name: str, dtype: torch.dtype) -> Learned:
    """Let a module's parameter learn, rounded to the dtype that it is stored in; return what learns."""
    start = module._parameters.pop(name)
    assert start is not None
    learned = Learned(start.data.to(dtype))
    module.add_module(f"learned_{name}", learned)

    def compute(module: nn.Module, args: Any) -> None:
        setattr(module, name, learned())

    module.register_forward_pre_hook(compute)
    return learned


def recompute_blocks(blocks: Iterator[nn.Module] | list[nn.Module]) -> None:
    """Let each block keep only its input for the backward pass and run again there: memory of one block at a time."""
    for block in blocks:
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
