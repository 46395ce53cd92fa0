"""Checkpoints of a training that a killed run goes on from: which were written to their end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kv_cache.atomic import write_bytes

WHOLE = "whole"
"""Written last into a checkpoint's folder: one without it was interrupted."""


class MarkWhole(TrainerCallback):
    """Marks checkpoints that the Trainer has written to their end."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the one of this step."""
        if args.should_save:
            write_bytes(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / WHOLE, b"")


def step_of(checkpoint: Path | None) -> int:
    """Return the step that a checkpoint was written after; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def last_whole(work: Path, *, delete: bool = True) -> Path | None:
    """Return the newest checkpoint that was written to its end; delete those that were not.

    Args:
        work: folder of the checkpoints.
        delete: whether this process is the one that deletes.

    """
    found = [path for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    whole = [path for path in found if (path / WHOLE).is_file()]
    if delete:
        for path in set(found) - set(whole):
            shutil.rmtree(path)
    return max(whole, key=step_of, default=None)
