"""Writing results so that a file is either absent or whole, also after a crash or Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kv_cache import atomic
from kv_cache.errors import ParetoError


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ParetoError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file of this process's own beside ``path`` that takes its place if the block ends well.

    Raises:
        ParetoError: the place cannot be written, or the disk is full.

    """
    with contextlib.ExitStack() as stack:
        with _written(path):
            partial = stack.enter_context(atomic.replacing(path))
        # An error of the block's own, a lost connection say, stays what it is.
        yield partial
        with _written(path):
            stack.close()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, creating its folder.

    Raises:
        ParetoError: the place cannot be written, or the disk is full.

    """
    with _written(path):
        atomic.write_bytes(path, data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused, since JSON has none."""
    write_text(path, _json(data, "\n") + "\n")


LINE = 160
"""Characters up to which what holds others is one line."""


def _json(data: Any, newline: str) -> str:
    """Return JSON text, an entry a line; what fits on a line, or is a list that holds no lists or objects, is one."""
    flat = json.dumps(data, ensure_ascii=False, allow_nan=False)
    inner = newline + " "
    if isinstance(data, dict) and (newline == "\n" or len(flat) > LINE) and data:
        entries = (
            f"{json.dumps(_name(key), ensure_ascii=False)}: {_json(value, inner)}" for key, value in data.items()
        )
        return "{" + inner + ("," + inner).join(entries) + newline + "}"
    nested = isinstance(data, list | tuple) and any(isinstance(one, dict | list | tuple) for one in data)
    if nested and len(flat) > LINE:
        return "[" + inner + ("," + inner).join(_json(one, inner) for one in data) + newline + "]"
    return flat


def _name(key: Any) -> str:
    """Return a key as json makes it a string."""
    return key if isinstance(key, str) else next(iter(json.loads(json.dumps({key: None}))))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a ``.npz`` file atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of a ``.npz`` file, or None where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError):
        return None
    except Exception as error:
        # zipfile raises its own BadZipFile for a file that was cut short.
        if type(error).__name__ == "BadZipFile":
            return None
        raise


def read_json(path: Path) -> Any:
    """Return a JSON file's content, or None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
