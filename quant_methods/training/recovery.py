"""Recovery: what pruning left of a model learns to put out what the dense model did, and every zero stays.

All weights that are left may learn, or, for less memory, a product of two narrow matrices for each layer, which is
added and masked: ``mask * (W + B A)``. So the zeros are kept while it learns and nothing is added to the checkpoint, as
in Hu et al., "LoRS: Efficient Low-Rank Adaptation for Sparse Large Language Model" (2025),
https://arxiv.org/abs/2501.08582, and Lu et al., "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large
Language Models" (2024), https://arxiv.org/abs/2405.16057. The loss is the divergence from the dense model,
which Sanh et al. (``movement.py``) call distillation, or the text's own; the loop is that of ``trainer.py``.

It comes after the prune steps. A rounding step may follow: it starts from what was recovered, and keeps the zeros too.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.handlers import completes, register
from quant_methods.training.masked_model import LearnedProduct, MaskedLinear
from quant_methods.training.settings import WeightTraining
from quant_methods.training.trainer import Trainer
from quant_methods.training.tuned_model import Learned


@register("recover")
@dataclass(frozen=True)
class Recover(WeightTraining):
    """Recovery after pruning.

    Attributes:
        lora: rank of the product that learns in each layer; 0: all weights that are left learn.

    """

    lora: int = 0

    def check(self) -> None:
        """Refuse settings without data or steps, and a rank that is none."""
        super().check()
        if self.lora < 0:
            raise ParetoError(f"recover: lora {self.lora} is negative; 16 is usual, and 0 lets all weights learn")


@completes(Recover)
class Recoverer(Trainer):
    """Trains the pruned layers of an unfinished run."""

    verb = "recovering"
    settings: Recover

    @property
    def layers(self) -> set[str]:
        """The pruned layers."""
        return set(self.prunes)

    def layer(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> MaskedLinear:
        """Return a pruned layer in training; see :class:`Trainer`."""
        weight = tensors[f"{name}.weight"].to(self.device)
        learned: Learned | LearnedProduct
        if self.settings.lora:
            rank, own = min(self.settings.lora, *weight.shape), self.settings.seed << 32 | zlib.crc32(name.encode())
            learned = LearnedProduct(weight, rank, torch.Generator().manual_seed(own))
        else:
            learned = Learned(weight)
        return MaskedLinear(learned, weight != 0, module._parameters["bias"])
