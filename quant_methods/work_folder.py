"""The folder beside an output in which it is made: one run at a time, and a rename in the end."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.replaceable import check_replaceable

LOCK = "lock"


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Create a work folder if there is none, and keep other runs out of it.

    Raises:
        ParetoError: another run is in it.

    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ParetoError(f"{work} is in use by another run; wait for it or give another --out") from None
        yield


def empty(work: Path, keep: Collection[str] = ()) -> None:
    """Delete all that is in a locked work folder, but the names to keep."""
    for path in work.iterdir():
        if path.name != LOCK and path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def put_in_place(made: Path, out: Path, work: Path) -> None:
    """Rename a finished folder to the output; what was there before moves into the work folder.

    Raises:
        ParetoError: what lies there now, hours after the first look, must not be replaced.

    """
    check_replaceable(out)
    if out.exists():
        old = work / "replaced"
        if old.exists():
            shutil.rmtree(old)
        out.rename(old)
    made.rename(out)
