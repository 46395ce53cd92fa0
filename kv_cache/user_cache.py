"""Where this project keeps what it can make again, who uses it just now, and what may go.

An entry is a folder or a file of ``<cache>/<kind>/``. Entries of several files have a file ``lock``, held while
somebody makes the entry, and a file ``users``, on which everybody who reads it holds a shared lock: so that two
processes do not write the same entry, and clearing takes nothing away from a process that runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kv_cache.errors import ParetoError

LOCK, USERS = "lock", "users"
KINDS = {
    "baselines": re.compile(r"[0-9a-f]{24}"),
    "kv-scales": re.compile(r"[0-9a-f]{64}-\S+|dummy-[0-9a-f]{24}"),
    "samples": re.compile(r"[0-9a-f]{32}\.safetensors"),
    "kernels": re.compile(r"[0-9a-f]{64}\.cubin"),
    "backends": re.compile(r"[a-z][a-z0-9_.-]*-\d[0-9.]*(-cuda)?"),
    "models": re.compile(r"[a-z0-9-]+-\d+"),
}
"""What lies in the cache, by folder, and how its entries are named; whatever else lies there is not this project's."""
TRIMMED = ("baselines", "kv-scales", "samples", "kernels")
"""Kinds that the limit is for: those that are made again without a word. An environment of another tool is not."""
LIMIT_VARIABLE = "PARETO_CACHE_LIMIT_GB"
LIMIT_GB = 50.0


def cache_dir() -> Path:
    """Return the folder of what is kept between runs: ``$PARETO_CACHE``, else ``pareto`` in the user's cache folder."""
    named = os.environ.get("PARETO_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pareto"


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Hold a lock on a file for a while; the operating system lets go of it when a process dies."""
    with contextlib.ExitStack() as held:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(path.open("a"))
            except OSError as error:
                raise ParetoError(f"{path.parent}: cannot be written ({error.strerror or error})") from error
            fcntl.flock(file, how)
            # Whoever cleared the entry while this process waited took the file with it; a newer one has another number.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    break
            held.close()
        yield


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Hold the right to write into an entry's folder, after whoever has it."""
    with _locked(folder / LOCK, fcntl.LOCK_EX):
        yield


def is_being_made(folder: Path) -> bool:
    """Return whether somebody writes into an entry's folder just now."""
    try:
        with _locked(folder / LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


@contextlib.contextmanager
def using(folder: Path) -> Iterator[None]:
    """Keep an entry's folder from being cleared for a while, and remember when it was used."""
    with _locked(folder / USERS, fcntl.LOCK_SH):
        os.utime(folder)
        yield


@dataclass(frozen=True)
class Entry:
    """Something that is kept.

    Attributes:
        kind: the folder it lies in, of KINDS.
        path: a folder or a file.
        size: bytes.
        used: when it was last used, as far as known, in seconds since 1970.

    """

    kind: str
    path: Path
    size: int
    used: float

    def remove(self) -> bool:
        """Remove it unless somebody uses it; returns whether it is gone."""
        locks = [self.path / LOCK, self.path / USERS, self.path.with_name(f"{self.path.name}.lock")]
        with contextlib.ExitStack() as held:
            for lock in locks:
                if lock.is_file() and not _take(held.enter_context(lock.open("a"))):
                    return False
            # The name goes first: nobody finds half of an entry.
            gone = self.path.with_name(f".gone-{os.getpid()}-{self.path.name}")
            try:
                self.path.rename(gone)
            except OSError:
                return False
            if gone.is_dir():
                shutil.rmtree(gone, ignore_errors=True)
            else:
                gone.unlink(missing_ok=True)
        return True


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def entries(kinds: Iterable[str] = KINDS) -> list[Entry]:
    """Return what is kept of some kinds, the longest unused first."""
    found = []
    for kind in kinds:
        folder = cache_dir() / kind
        for path in folder.iterdir() if folder.is_dir() else ():
            if KINDS[kind].fullmatch(path.name) and not path.is_symlink() and not path.name.endswith(".lock"):
                with contextlib.suppress(FileNotFoundError):
                    found.append(Entry(kind, path, _size(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def limit_bytes() -> float:
    """Return how many bytes the cache may hold: ``$PARETO_CACHE_LIMIT_GB``, or 50 GB.

    Raises:
        ParetoError: the variable is no number.

    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text) if text else LIMIT_GB
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ParetoError(f"{LIMIT_VARIABLE}={text} is not a number of gigabytes, such as {LIMIT_GB:g}")
    return limit * 1e9


def trim() -> list[Entry]:
    """Remove what was unused longest until the cache is within its limit; returns what was removed.

    Nothing that somebody uses is removed, so that the cache may stay above its limit.
    """
    limit, kept = limit_bytes(), entries(TRIMMED)
    total, gone = sum(entry.size for entry in kept), []
    for entry in kept:
        if total <= limit:
            break
        if entry.remove():
            total -= entry.size
            gone.append(entry)
    return gone


def clear(kinds: Iterable[str] = KINDS, *, unused_days: float = 0.0) -> tuple[list[Entry], list[Entry]]:
    """Remove entries of some kinds that have been unused for so many days; returns those gone and those in use."""
    gone: list[Entry] = []
    kept: list[Entry] = []
    before = time.time() - 86_400 * unused_days
    for entry in entries(kinds):
        if entry.used <= before:
            (gone if entry.remove() else kept).append(entry)
    return gone, kept
