"""Settings of a fine-tuning; what each means to a user is said in the command's help."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kv_cache.errors import ParetoError

ALL = "all-linear"
"""What peft calls all linear layers but the one that gives logits."""


@dataclass(frozen=True)
class Settings:
    """How an adapter learns.

    Attributes:
        rank: of the products that are added to layers.
        alpha: what they are multiplied by, times the rank.
        dropout: share of a product's inputs that are left out while it learns.
        targets: last names of the layers that get one; (ALL,): all linear layers of the blocks.
        epochs: passes over the examples; not used where ``steps`` says how long.
        steps: in all; 0: as many as the epochs have.
        batch: examples a step, of all devices together.
        micro_batch: of which so many are in memory at once, on a device.
        length: tokens of an example; what is longer is cut at its end.
        learning_rate: AdamW's highest; warmed up over the first 3% of the steps, then down to 0 as a cosine.
        held_out: examples that are not trained on and decide which state is kept.
        save_steps: steps between two looks at them, and between two checkpoints; 0: a tenth of all steps.
        dora: norms of output channels learn apart from their directions (DoRA).
        pooled: products see one number of each group of inputs, so that zero-points can hold them (``pooled.py``).
        checkpointing: run each block again on the way back instead of keeping what it computed.
        bfloat16: multiply in bfloat16 where the device is quick at it; weights and steps stay float32.
        seed: of the adapter's start, of dropout and of the order of examples.

    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL,)
    epochs: float = 1.0
    steps: int = 0
    batch: int = 16
    micro_batch: int = 4
    length: int = 1024
    learning_rate: float = 2e-4
    held_out: int = 64
    save_steps: int = 0
    dora: bool = False
    pooled: bool = False
    checkpointing: bool = False
    bfloat16: bool = True
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers that make no training.

        Raises:
            ParetoError: such a number.

        """
        if self.rank < 1:
            raise ParetoError(f"--lora-rank {self.rank}: expected 1 or more; 16 is usual")
        for name in ("epochs", "learning_rate", "alpha", "batch", "micro_batch", "held_out"):
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ParetoError(f"{_flag(name)} {getattr(self, name):g} is not positive")
        if not 0 <= self.dropout < 1:
            raise ParetoError(f"--dropout {self.dropout:g} is not between 0 and 1")
        if self.pooled and self.dropout:
            raise ParetoError("--dropout is for adapters that stay adapters; leave it out with --pooled")
        if self.pooled and self.dora:
            raise ParetoError("--pooled moves zero-points, which hold no magnitudes; leave out --dora")
        if self.length < 2:
            raise ParetoError(f"--length {self.length}: expected 2 or more")
        if self.steps < 0 or self.save_steps < 0:
            raise ParetoError("--steps and --save-steps are not negative")
        if self.batch % self.micro_batch:
            raise ParetoError(f"--micro-batch {self.micro_batch} does not divide --batch {self.batch}")

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {**asdict(self), "targets": list(self.targets)}


def _flag(name: str) -> str:
    return "--lora-alpha" if name == "alpha" else f"--{name.replace('_', '-')}"
