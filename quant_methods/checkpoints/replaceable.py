"""What ``--overwrite`` may replace: a checkpoint or an unfinished run of ours, and nothing beside it.

A finished run takes the place of the whole folder that ``--out`` names, so a mistyped name could take a folder of other
models along. Therefore every file there has to be one that a run writes.
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

from kv_cache.errors import ParetoError
from kv_cache.scales import SCALES_FILE
from quant_methods.checkpoints.checkpoint import COPIED
from quant_methods.model_source import INDEX

RECIPE_FILE = "pareto_recipe.json"
"""What every checkpoint of ours holds: how it was made."""
# Beside what is copied from the model: weights, and what the budget modes attach.
_WRITTEN = (
    "config.json", RECIPE_FILE, INDEX, "model.safetensors", "model-*.safetensors", "gptq_model-*.safetensors",
    "pareto_sensitivity.json", "pareto_sensitivity.png", "pareto_kv_bits.json", "pareto_kv_bits.png",
    SCALES_FILE.as_posix(),
)  # fmt: skip
TRAINED = "trained"
"""In an unfinished run, the checkpoint that it rounds, if it trained one first."""
# What an unfinished run may hold before its state is written.
_EARLY = ("lock", "sensitivity", "state.json.partial", TRAINED, f"{TRAINED}.partial")


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an empty folder or a checkpoint of ours.

    Raises:
        ParetoError: with the first file that is not ours.

    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise ParetoError(f"{out} is not a folder, and --overwrite replaces checkpoints only; give another --out")
    files = sorted(path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    if not files and any(out.iterdir()):
        raise ParetoError(f"{out} holds other folders ({min(out.iterdir()).name}); give another --out")
    if files and not (out / RECIPE_FILE).is_file():
        raise ParetoError(
            f"{out} is no checkpoint that pareto wrote (it has {files[0].relative_to(out)} and no {RECIPE_FILE}), so "
            "--overwrite leaves it alone; give another --out"
        )
    allowed = (*COPIED, *_WRITTEN, *_shards(out))
    for path in files:
        name = path.relative_to(out).as_posix()
        # A star does not reach into folders: fnmatch would let it.
        if not any(fnmatch.fnmatchcase(name, glob) and name.count("/") == glob.count("/") for glob in allowed):
            raise ParetoError(
                f"{out} also holds {name}, which pareto did not write, so --overwrite leaves it alone; move that file "
                "away or give another --out"
            )


def check_unfinished(work: Path) -> None:
    """Refuse a state directory that is none: it would be deleted with all that it holds when the run ends.

    Raises:
        ParetoError: it holds something and no state of a run.

    """
    if work.exists() and not work.is_dir():
        raise ParetoError(f"{work} is not a folder, and an unfinished run lies there; give another --out")
    if work.is_dir() and not (work / "state.json").is_file():
        for path in sorted(work.iterdir()):
            if path.name not in _EARLY:
                raise ParetoError(
                    f"{work} is where the unfinished run would lie, and it holds {path.name}, which pareto did not "
                    "write; give another --out"
                )


def check_apart(out: Path, needed: dict[str, Path]) -> None:
    """Refuse a place that is, or lies above, something which has to stay.

    Args:
        out: the place.
        needed: what has to stay, by what to call it.

    Raises:
        ParetoError: with what lies there.

    """
    place = out.resolve()
    for what, path in needed.items():
        found = path.resolve()
        if place == found:
            raise ParetoError(f"{out} is {what} itself; give another --out")
        if place in found.parents:
            raise ParetoError(f"{out} holds {what} ({path}); give another --out")


def _shards(out: Path) -> list[str]:
    """Return the weight files that the checkpoint's index names; the KV scales' recipe keeps the model's names."""
    try:
        return sorted(set(json.loads((out / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
