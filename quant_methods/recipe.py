"""A recipe: which steps a compression takes, in which order, and what they are calibrated on.

``recipe_file.py`` reads recipes from YAML.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

from kv_cache.errors import ParetoError
from quant_methods.model_source import digest
from quant_methods.steps import KINDS, ModelStep, PruneStep, RoundStep, SourceStep, Step, TrainStep


@dataclass(frozen=True)
class Calibration:
    """What calibration runs on.

    Attributes:
        num_samples: sequences.
        length: tokens in each.
        seed: seed of everything random: sampling, and the KV-scale calibrator.

    """

    num_samples: int = 128
    length: int = 1024
    seed: int = 0

    def check(self) -> None:
        """Refuse settings without data.

        Raises:
            ParetoError: no sequence, or sequences shorter than 2 tokens.

        """
        if self.num_samples < 1 or self.length < 2:
            raise ParetoError(
                f"calibration needs at least 1 sequence of at least 2 tokens, got {self.num_samples} of {self.length}"
            )


@dataclass(frozen=True)
class Recipe:
    """A compression.

    Attributes:
        name: what the user called it.
        description: one line.
        steps: what is done, in order; empty to copy the weights.
        ignore: globs over module names (``lm_head``, ``*.down_proj``) that stay unquantized.
        exempt: names of parts of the model that stay unquantized too; see ``exempt.py``.
        calibration: the data.
        kv_scales: calibrate scales of a quantized KV cache in the same pass.

    """

    name: str
    description: str = ""
    steps: tuple[Step, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)
    exempt: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    kv_scales: bool = True

    @property
    def rounding(self) -> tuple[RoundStep, ...]:
        """The steps that round weights, and what prune steps round in the same pass."""
        found = (step.rounding if isinstance(step, PruneStep) else step for step in self.steps)
        return tuple(step for step in found if isinstance(step, RoundStep))

    def check(self) -> None:
        """Refuse steps that are out of place: their order is that of their kinds, see ``steps.py``.

        Raises:
            ParetoError: with the step, and where it belongs.

        """
        for step in self.steps[1:]:
            if isinstance(step, SourceStep):
                raise ParetoError(f"recipe {self.name}: {step.method} comes once, and first")
        for step in self.steps[:-1]:
            if isinstance(step, ModelStep) and not isinstance(step, TrainStep):
                raise ParetoError(
                    f"recipe {self.name}: {step.method} comes once, and last: it works on what the other steps made"
                )
        if len(training := [step for step in self.steps if isinstance(step, TrainStep)]) > 1:
            raise ParetoError(
                f"recipe {self.name}: {training[0].method} and {training[1].method} both train the model; keep one"
            )
        for before, after in itertools.pairwise(self.steps):
            if KINDS.index(before.kind) > KINDS.index(after.kind):
                raise ParetoError(
                    f"recipe {self.name}: {after.method}, a {after.kind} step, comes before {before.method}, a "
                    f"{before.kind} step; the order of steps is {', '.join(KINDS)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as YAML would have it."""
        data = dataclasses.asdict(self)
        data["steps"] = [{"method": step.method, **dataclasses.asdict(step)} for step in self.steps]
        return data

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) over everything that determines the result; name and description do not."""
        data = self.to_dict()
        del data["name"], data["description"]
        return digest(data)
