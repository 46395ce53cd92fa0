"""The models that ship with the package, as folders beside this file.

In the repository their weights are packed (``model.safetensors.xz``), which saves a third; setting up, building a
wheel, or the first use unpacks them. ``setup.py`` runs this file by its path, so it imports nothing of the package.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tempfile
from pathlib import Path

MODELS = Path(__file__).parent / "models"
PACKED = ".xz"


def names() -> list[str]:
    """Return the names of the models."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def unpack(models: Path = MODELS) -> None:
    """Unpack every packed file that has not been, each written whole or not at all.

    Args:
        models: the folder of the models' folders.

    Raises:
        OSError: a folder cannot be written to, or the disk is full.

    """
    for packed in models.glob(f"*/*{PACKED}"):
        target = packed.with_suffix("")
        if target.exists() and target.stat().st_mtime >= packed.stat().st_mtime:
            continue
        handle, temporary = tempfile.mkstemp(dir=packed.parent)
        try:
            with os.fdopen(handle, "wb") as file, lzma.open(packed) as source:
                shutil.copyfileobj(source, file)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
