"""Movement pruning: weights and the scores that choose which of them stay learn together.

Sanh, Wolf, Rush: "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020), https://arxiv.org/abs/2005.07683. A layer
computes with ``W * M``, M being the mask of the highest scores S, ``Top_v(S)`` (section 4). The gradient passes through
the mask as if it were S, so that ``dL/dS = dL/d(W * M) * W`` (Eq. 2): scores rise of weights that move away from zero.
Scores begin at 0. The share that becomes zero is none for the first steps, rises as a cubic, and stays what it is to
become for the last ones (section 5, after Zhu and Gupta, https://arxiv.org/abs/1710.01878). With a pattern N:M, whole
numbers of each M neighbours become zero, fewer at first.

It is the reference of what training can choose. Adam's steps do not depend on the scale of the scores, nor does the
mask, so that their learning rate has no meaning beside the other's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.handlers import LinearProblem, completes, prunes, register
from quant_methods.methods.pruning import least
from quant_methods.steps import PruneStep
from quant_methods.training.masked_model import ScoredLinear
from quant_methods.training.settings import WeightTraining
from quant_methods.training.trainer import Trainer
from quant_methods.training.tuned_model import Learned

SCORE_RATE = 1e-2
"""Adam's for scores, as in the paper."""


@register("movement")
@dataclass(frozen=True)
class Movement(WeightTraining, PruneStep):
    """Movement pruning.

    Attributes:
        warm: fraction of the steps before the first zero.
        cool: fraction of the steps, at the end, with all zeros; states are kept of these alone.

    """

    warm: float = 0.1
    cool: float = 0.3

    def check(self) -> None:
        """Refuse settings without data or steps, a fraction or pattern of zeros that is none, and no time to prune."""
        super().check()
        PruneStep.check(self)
        if self.warm < 0 or self.cool < 0 or self.warm + self.cool >= 1:
            raise ParetoError(
                f"movement: warm {self.warm:g} and cool {self.cool:g} leave no step to prune in; they are fractions of "
                "the steps, together below 1"
            )
        if self.refit:
            raise ParetoError("movement: refit has nothing to fit, as what is left has learned; leave it out")

    def share(self, step: int) -> float:
        """Return which fraction of the zeros is there after so many steps."""
        start, end = self.warm * self.steps, (1 - self.cool) * self.steps
        passed = min(1.0, max(0.0, (step - start) / (end - start)))
        return 1 - (1 - passed) ** 3


@prunes(Movement)
def unchanged(step: Movement, problem: LinearProblem) -> Tensor:
    """Return a layer's weight as it is: which of it becomes zero is learned once all blocks are there."""
    return problem.weight.clone()


@completes(Movement)
class Mover(Trainer):
    """Prunes the layers of an unfinished run."""

    verb = "pruning by movement"
    steps_alike = False  # The weights that are left change between steps.
    settings: Movement

    @property
    def layers(self) -> set[str]:
        """The layers to prune."""
        return {name for name, step in self.prunes.items() if isinstance(step, Movement)}

    def layer(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> ScoredLinear:
        """Return a layer in training; see :class:`Trainer`."""
        return ScoredLinear(Learned(tensors[f"{name}.weight"].to(self.device)), module._parameters["bias"])

    def groups(self, parameters: dict[str, nn.Parameter]) -> list[dict[str, object]]:
        """Return scores and the rest, each with its rate."""
        scores = [value for name, value in parameters.items() if name.endswith(".scores")]
        rest = [value for name, value in parameters.items() if not name.endswith(".scores")]
        return [{"params": rest, "rate": self.settings.learning_rate}, {"params": scores, "rate": SCORE_RATE}]

    @torch.no_grad()
    def prepare(self, step: int) -> None:
        """Choose the masks by the scores of now."""
        share = self.settings.share(step)
        for module in self.student.model.modules():
            if isinstance(module, ScoredLinear):
                # Without a pattern the whole layer is one row, as for magnitude pruning.
                whole = (1, -1) if self.settings.kept_among is None else module.scores.shape
                module.mask.copy_(~least(module.scores.view(whole), self.settings, share).view_as(module.mask))

    def counts(self, step: int) -> bool:
        """Return whether all zeros are there after so many steps."""
        return self.settings.share(step) == 1
