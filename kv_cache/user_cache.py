"""Where this project keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder of what is kept between runs: ``$PARETO_CACHE``, else ``pareto`` in the user's cache folder."""
    named = os.environ.get("PARETO_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pareto"
