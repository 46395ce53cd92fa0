"""Settings of the steps that train a whole model; ``trainer.py`` carries them out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kv_cache.errors import ParetoError
from quant_methods.steps import ModelStep, TrainStep

WARM_UP = 0.05
"""Of the steps, the fraction in which the learning rate rises."""


@dataclass(frozen=True)
class Training(ModelStep):
    """What every step that trains has.

    Attributes:
        num_samples: sequences to train on, from the start of the text, as calibration's.
        length: tokens in each.
        held_out: sequences after these that decide which state is kept.
        batch: sequences a step.
        learning_rate: Adam's, relative to the mean size of what is stored; warmed up, then down to 0 as a cosine.
        norms: train norms' weights and biases too.
        bfloat16: run the compressed model's matrix products in bfloat16, where the device is quick at it.
        seed: of the order of the sequences, and of what else is random.

    """

    num_samples: int = 256
    length: int = 1024
    held_out: int = 16
    batch: int = 8
    learning_rate: float = 2e-3
    norms: bool = True
    bfloat16: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse settings without data or steps."""
        if self.num_samples < 1 or self.held_out < 1 or self.length < 2:
            raise ParetoError(
                f"{self.method} needs at least 1 sequence and 1 held out, of at least 2 tokens, got {self.num_samples} "
                f"and {self.held_out} of {self.length}"
            )
        if not 1 <= self.batch <= self.num_samples:
            raise ParetoError(
                f"{self.method}: batch {self.batch} is not between 1 and num_samples ({self.num_samples})"
            )

    @property
    def text(self) -> tuple[int, int]:
        """How many sequences it runs on, those held out included, and the tokens of each."""
        return self.num_samples + self.held_out, self.length

    @property
    def steps(self) -> int:
        """Steps in all."""
        raise NotImplementedError

    def rate(self, step: int) -> float:
        """Return the learning rate of a step as a fraction of the given one."""
        warm = max(1, round(WARM_UP * self.steps))
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def order(self, step: int) -> list[int]:
        """Return the sequences of a step: every epoch its own permutation, whatever was done before."""
        found: list[int] = []
        for at in range(step * self.batch, (step + 1) * self.batch):
            epoch, position = divmod(at, self.num_samples)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            found.append(int(torch.randperm(self.num_samples, generator=generator)[position]))
        return found


@dataclass(frozen=True)
class WeightTraining(Training, TrainStep):
    """What every step that trains weights of 16 bits has.

    Attributes:
        train_steps: steps in all, over as many epochs of the sequences as that takes.
        loss: ``kl``: the divergence from the original; ``text``: the text's own loss.

    """

    num_samples: int = 512
    learning_rate: float = 1e-2
    bfloat16: bool = True
    train_steps: int = 1000
    loss: Literal["kl", "text"] = "kl"

    def check(self) -> None:
        """Refuse settings without data or steps."""
        super().check()
        if self.learning_rate <= 0 or self.train_steps < 1:
            raise ParetoError(
                f"{self.method}: learning_rate and train_steps are positive, got {self.learning_rate:g} and "
                f"{self.train_steps}"
            )

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.train_steps

    @property
    def on_text(self) -> bool:
        """Whether the loss is the text's own."""
        return self.loss == "text"
