"""The way from hidden states to logits, apart from the model, so that logits of a few tokens exist at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

PROBED = 4
"""Tokens that show whether a model's logits are its head's output and nothing else."""


class Head:
    """A causal language model's head.

    Models that do more than multiply by a matrix (soft caps, scaled logits) keep their own way, and so do those whose
    parameters are spread over devices, which only their own forward pass gathers: their logits exist all at once.

    Args:
        model: of transformers, with its weights, not yet wrapped for several devices.
        bfloat16: multiply in bfloat16.
        whole: never take the head apart.

    """

    def __init__(self, model: Any, *, bfloat16: bool = False, whole: bool = False) -> None:
        self.linear, self.bfloat16 = model.get_output_embeddings(), bfloat16
        self.apart = not whole and isinstance(self.linear, nn.Linear) and self._explains(model)

    @torch.no_grad()
    def _explains(self, model: Any) -> bool:
        """Return whether the head alone makes a model's logits of what enters it."""
        was_training = model.training
        model.eval()
        tokens = torch.arange(1, PROBED + 1, device=self.linear.weight.device)[None]
        self.apart = False
        expected = model(input_ids=tokens, use_cache=False).logits
        self.apart = True
        with self.removed():
            entering = model(input_ids=tokens, use_cache=False).logits
        model.train(was_training)
        if entering.shape[-1] != self.linear.in_features:
            return False
        return torch.allclose(self.linear(entering).float(), expected.float(), rtol=1e-3, atol=1e-3)

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """Let the model return, as its logits, what enters its head, where that makes them."""
        if not self.apart:
            yield
            return
        self.linear.forward = lambda states: states
        try:
            yield
        finally:
            del self.linear.forward

    def logits(self, states: Tensor) -> Tensor:
        """Return float32 logits [..., vocabulary] of what the model returned inside ``removed``."""
        if not self.apart:
            return states.float()
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.bfloat16):
            found: Tensor = self.linear(states if self.bfloat16 else states.to(self.linear.weight.dtype))
        return found.float()
