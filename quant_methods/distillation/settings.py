"""Settings of a distillation; what each means to a user is said in the command's help."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kv_cache.errors import ParetoError


@dataclass(frozen=True)
class Settings:
    """How a student learns.

    Attributes:
        samples: sequences to train on.
        held_out: sequences that decide which state is kept.
        length: tokens of each.
        epochs: passes over the samples; not used where ``steps`` says how long.
        steps: in all; 0: as many as the epochs have.
        batch: sequences a step, of all devices together.
        micro_batch: of which so many are in memory at once, on a device.
        learning_rate: AdamW's highest; warmed up over the first 5% of the steps, then down to 0 as a cosine.
        weight_decay: AdamW's.
        kl_share: lambda: the loss is ``lambda T^2 KL + (1 - lambda) CE``; 0 is training on text alone.
        temperature: T, that logits are divided by in the KL; its square keeps gradients of one size (Hinton et al.
            2015, https://arxiv.org/abs/1503.02531, section 2).
        loss: which divergence, a name of ``losses.DIVERGENCES``.
        skew: of those that are skewed.
        hidden: weight of the distance between hidden states; 0: none.
        targets: last names of the layers that learn, as ``k_proj``; none: all do.
        on_policy: share of the training in which the student writes itself, and learns from the teacher alone what that
            would have said there (``on_policy.py``).
        new_tokens: that it writes at most, from a prompt of a chat, or from the beginning of a window of text.
        looks: times that the held-out sequences are looked at and a checkpoint is written.
        checkpointing: run each block again on the way back instead of keeping what it computed.
        bfloat16: multiply in bfloat16 where the device is quick at it; weights and steps stay float32.
        seed: of the order of sequences, of weights that are drawn, and of calibration.

    """

    samples: int = 1024
    held_out: int = 32
    length: int = 1024
    epochs: float = 1.0
    steps: int = 0
    batch: int = 8
    micro_batch: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    kl_share: float = 0.5
    temperature: float = 1.0
    loss: str = "forward"
    skew: float = 0.1
    hidden: float = 0.0
    targets: tuple[str, ...] = ()
    on_policy: float = 0.0
    new_tokens: int = 128
    looks: int = 10
    checkpointing: bool = False
    bfloat16: bool = True
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers that make no training.

        Raises:
            ParetoError: such a number.

        """
        # Imported late: the command reads these settings before PyTorch, whose threads read once how they wait.
        from quant_methods.training.losses import divergence

        divergence(self.loss, self.skew)
        if not 0 <= self.kl_share <= 1:
            raise ParetoError(f"--kl-share {self.kl_share:g} is not between 0 (text alone) and 1 (the teacher alone)")
        positive = ("epochs", "learning_rate", "temperature", "batch", "micro_batch", "looks")
        for name in positive:
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ParetoError(f"--{name.replace('_', '-')} {getattr(self, name):g} is not positive")
        if self.batch % self.micro_batch:
            raise ParetoError(f"--micro-batch {self.micro_batch} does not divide --batch {self.batch}")
        self._check_on_policy()
        if self.steps < 0:
            raise ParetoError(f"--steps {self.steps} is negative")
        if self.hidden < 0 or self.weight_decay < 0:
            raise ParetoError("--hidden and --weight-decay are not negative")

    def _check_on_policy(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise ParetoError(
                f"--on-policy {self.on_policy:g} is not between 0 (text alone) and 1 (its own words alone)"
            )
        if not self.on_policy:
            return
        if not self.kl_share:
            raise ParetoError("--on-policy: what a student writes itself only a teacher can judge; raise --kl-share")
        if not 1 <= self.new_tokens < self.length:
            raise ParetoError(
                f"--new-tokens {self.new_tokens} is not between 1 and {self.length - 1}, which leaves a token of "
                f"--length {self.length} to write on from"
            )

    @property
    def total_steps(self) -> int:
        """Steps in all."""
        return self.steps or max(1, math.ceil(self.epochs * self.samples / self.batch))

    @property
    def temperatures(self) -> tuple[float, ...]:
        """At which the teacher's probabilities are wanted; held-out sequences are measured at 1."""
        return tuple(sorted({1.0, self.temperature}))

    def as_json(self) -> dict[str, Any]:
        """Return them as JSON values."""
        return {**asdict(self), "targets": list(self.targets)}
