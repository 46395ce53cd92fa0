"""A pruned model in training: zeros stay exactly what they are, and the weights that are left learn.

As in ``tuned_model.py``, the model always computes with the values that the file would hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant_methods.training.tuned_model import Learned, straight


class LearnedProduct(nn.Module):
    """A weight that learns by a product of two narrow matrices, which is added to it: ``W + unit * (up @ down)``.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), https://arxiv.org/abs/2106.09685, section
    4.1: ``up`` starts at zero, ``down`` at random. As in ``Learned``, ``unit`` is the mean size of a row, and a product
    of entries of variance 1 / rank keeps one learning rate fit for every rank.

    Args:
        start: [out, in], the weight as stored.
        rank: of the product.
        generator: draws ``down``; on the CPU, so that every device draws the same.

    """

    def __init__(self, start: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dtype = start.dtype
        base = start.float()
        unit = base.abs().mean(-1, keepdim=True)
        self.register_buffer("start", start)
        self.register_buffer("unit", torch.where(unit > 0, unit, torch.ones_like(unit)))
        down = torch.randn(rank, start.shape[1], generator=generator) / rank**0.5
        self.up = nn.Parameter(torch.zeros(start.shape[0], rank, device=start.device))
        self.down = nn.Parameter(down.to(start.device))

    def forward(self) -> Tensor:
        """Return the weight, float32."""
        # In bfloat16 the product would differ from what is stored at the end.
        with torch.autocast(self.up.device.type, enabled=False):
            whole = self.start.float() + self.unit * (self.up @ self.down)
        return straight(whole, lambda x: x.to(self.dtype).to(x.dtype))


class MaskedLinear(nn.Module):
    """A pruned linear layer in training: ``mask * weight``, so that what was zero stays exactly zero.

    Args:
        learned: gives the float32 weight [out, in], rounded to the dtype that it is stored in.
        mask: bool [out, in], the weights that are left.
        bias: [out] or None.

    """

    def __init__(self, learned: Learned | LearnedProduct, mask: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.learned = learned
        self.register_buffer("mask", mask)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def weight(self) -> Tensor:
        """Return the weight, float32 [out, in]."""
        return self.learned() * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for inputs [..., in]."""
        return functional.linear(x, self.weight(), self.bias)

    def stored(self) -> Tensor:
        """Return the weight as it is to be stored."""
        return self.weight().detach().to(self.learned.dtype)


class _Chosen(torch.autograd.Function):
    """``mask * weight``, whose gradient reaches the scores that the mask was chosen by as if the mask were these."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradients[0] * mask, gradients[0] * weight, None


class ScoredLinear(MaskedLinear):
    """A linear layer whose mask is chosen by scores that learn; it is chosen anew whenever somebody sets it.

    Args:
        learned: as for :class:`MaskedLinear`.
        bias: [out] or None.

    """

    def __init__(self, learned: Learned, bias: Tensor | None) -> None:
        super().__init__(learned, torch.ones_like(learned.start, dtype=torch.bool), bias)
        self.scores = nn.Parameter(torch.zeros_like(learned.start))

    def weight(self) -> Tensor:
        """Return the weight, float32 [out, in]."""
        return _Chosen.apply(self.learned(), self.scores, self.mask)
