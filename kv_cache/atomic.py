"""Writing files so that a reader sees the old file or the whole new one, also after a crash or Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file of this call's own beside ``path`` that takes its place, flushed to disk, if the block ends well.

    The folder is created. The file's permissions are those of any new file, since others read it too.

    Raises:
        OSError: the place cannot be written.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, as `replacing` does.

    Raises:
        OSError: the place cannot be written, or the disk is full.

    """
    with replacing(path) as partial:
        partial.write_bytes(data)
