"""Recipes that round weights after these have learned: they run as two, the second on what the first made.

The first half prunes and trains, and its checkpoint in 16 bits lies in the state directory of the whole. The second
rounds that, keeps its zeros, and aims, where it looks at a whole model, at what the original puts out.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.replaceable import RECIPE_FILE, TRAINED
from quant_methods.handlers import Tuned
from quant_methods.methods.kept import KeepZeros
from quant_methods.model_source import fingerprint
from quant_methods.recipe import Recipe
from quant_methods.steps import PruneStep, RoundStep, Step, TrainStep

if TYPE_CHECKING:
    from quant_methods.run import Run


@dataclass(frozen=True)
class Origin:
    """What the second half of a recipe starts from.

    Attributes:
        original: directory of the original model.
        trained: directory of what the first half made of it.
        recipe: the whole recipe.

    """

    original: Path
    trained: Path
    recipe: Recipe

    def provenance(self) -> dict[str, Any]:
        """Return what determines the result beside the second half."""
        return {
            "model_sha256": fingerprint(self.original),
            "recipe": self.recipe.to_dict(),
            "training": _told(self.trained)["training"],
            "trained_sha256": fingerprint(self.trained),
        }

    def found(self) -> Tuned:
        """Return what the training did."""
        found = _told(self.trained)["trained"]
        return Tuned.of({"kl": found["held_out"], "kept": found["kept_step"], "on_text": found["on_text"]})


def halves(recipe: Recipe) -> tuple[Recipe, Recipe] | None:
    """Return the recipe up to its training, and the rest of it; None where nothing comes after, or nothing trains."""
    at = next((i for i, step in enumerate(recipe.steps) if isinstance(step, TrainStep)), None)
    if at is None or not any(isinstance(step, RoundStep) for step in recipe.steps[at + 1 :]):
        return None
    first, rest = recipe.steps[: at + 1], recipe.steps[at + 1 :]
    zeros: list[Step] = [
        KeepZeros(sparsity=step.sparsity, pattern=step.pattern, targets=step.targets)
        for step in first
        if isinstance(step, PruneStep)
    ]
    return (
        dataclasses.replace(recipe, steps=first, kv_scales=False),
        dataclasses.replace(recipe, steps=(*zeros, *rest)),
    )


def folder_of(work: Path) -> Path:
    """Return where the first half's checkpoint lies in a state directory."""
    return work / TRAINED


def finished(run: Run, *, overwrite: bool) -> bool:
    """Return whether the first half's checkpoint is there already.

    Args:
        run: the first half, not begun.
        overwrite: what was made otherwise may be replaced.

    Raises:
        ParetoError: a checkpoint is there that was made otherwise.

    """
    if not (run.out / RECIPE_FILE).is_file():
        return False
    # As JSON has it: tuples become lists.
    wanted, told = json.loads(json.dumps(run.provenance)), _told(run.out)
    for each in (wanted, told):
        each["recipe"] = {name: value for name, value in each["recipe"].items() if name not in ("name", "description")}
    if differs := [name for name in wanted if told.get(name) != wanted[name]]:
        if not overwrite:
            raise ParetoError(
                f"{run.out} was trained with a different {', '.join(differs)}; repeat that command to finish it, or "
                "give --overwrite to start anew"
            )
        return False
    return True


def _told(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / RECIPE_FILE).read_text())
    return told
