"""Tuning: the last step of a recipe trains what is continuous in a quantized model, end to end.

Codes are frozen; scales (look-up tables, outlier channels, low-rank factors, where a layer has them) and norms, which
stay in 16 bits anyway, move by gradient: Chen et al., "EfficientQAT" (2024), https://arxiv.org/abs/2407.11062, section
3.3 (E2E-QP). The loss and the loop are those of ``trainer.py``.

``code_learning_rate`` lets the codes move too, by the straight-through estimator, as EfficientQAT's Block-AP (section
3.2) does block by block, but end to end and from what the step before made of them. AdaRound (Nagel et al., 2020,
https://arxiv.org/abs/2004.10568) and BRECQ (Li et al., 2021, https://arxiv.org/abs/2102.05426) learn the rounding of a
layer and of a block; here it is for the whole model's loss.

Of a pruned layer, a code that reads as zero stays so. The state before the first step may be kept too, so that a run
never ends worse than it began, on the sequences held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.formats.form import ACTIVATION_BITS
from quant_methods.formats.grid import expand
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.handlers import completes, register
from quant_methods.training.settings import Training
from quant_methods.training.trainer import Trainer
from quant_methods.training.tuned_model import LearnedCodes, TunedLinear


@register("tune")
@dataclass(frozen=True)
class Tune(Training):
    """Tuning by gradient; comes last.

    Attributes:
        epochs: passes over the sequences.
        code_learning_rate: as ``learning_rate``, for codes, in steps of their grid; 0 freezes them.

    """

    epochs: float = 4.0
    code_learning_rate: float = 0.0

    def check(self) -> None:
        """Refuse settings without data or steps."""
        super().check()
        if self.learning_rate <= 0 or self.code_learning_rate < 0 or self.epochs <= 0:
            raise ParetoError("tune: learning_rate and epochs are positive, code_learning_rate is not negative")

    @property
    def steps(self) -> int:
        """Steps in all."""
        return max(1, int(self.epochs * self.num_samples / self.batch))


@completes(Tune)
class Tuner(Trainer):
    """Tunes the quantized blocks of an unfinished run."""

    verb = "tuning"
    settings: Tune

    @property
    def layers(self) -> set[str]:
        """The quantized layers."""
        return set(self.steps)

    def layer(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> TunedLinear:
        """Return a quantized layer in training; see :class:`Trainer`."""
        step = self.steps[name]
        linear = self.storage.unpack(name, tensors, step).to(self.device)
        bits = ACTIVATION_BITS[step.activations]
        codes = None
        # Indices into a table have no order that a gradient could follow.
        grid = linear.get(GridCodes)
        if self.settings.code_learning_rate and grid is not None:
            weight = self.student.source.read(f"{name}.weight").to(self.device, torch.float32)
            kept = None
            if name in self.prunes:
                kept = grid.codes != expand(grid.zero_point, grid.codes.shape[1])
            codes = LearnedCodes(grid, step.grid, weight, kept)
        return TunedLinear(linear, module._parameters["bias"], bits, codes)

    def packed(self, name: str, layer: TunedLinear) -> dict[str, Tensor]:
        """Return the tensors of a layer; see :class:`Trainer`."""
        return self.storage.pack(name, layer.stored().cpu(), self.steps[name])

    def groups(self, parameters: dict[str, nn.Parameter]) -> list[dict[str, object]]:
        """Return codes and the rest, each with its rate."""
        codes = [value for name, value in parameters.items() if name.endswith(".codes.offset")]
        rest = [value for name, value in parameters.items() if not name.endswith(".codes.offset")]
        groups: list[dict[str, object]] = [{"params": rest, "rate": self.settings.learning_rate}]
        if codes:
            groups.append({"params": codes, "rate": self.settings.code_learning_rate})
        return groups
