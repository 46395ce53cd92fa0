"""Compiled kernels on disk, so that a second start of a server compiles nothing."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

from kv_cache.atomic import write_bytes
from kv_cache.user_cache import cache_dir


def kept(key: bytes, make: Callable[[], bytes]) -> bytes:
    """Return the machine code under a key, made and kept if it is not there, or not as it was written.

    A folder that cannot be read or written is done without.

    Args:
        key: all that the machine code depends on.
        make: returns it.

    """
    path = cache_dir() / "kernels" / f"{hashlib.sha256(key).hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        digest, code = _split(path.read_bytes())
        if digest == hashlib.sha256(code).digest():
            return code
    code = make()
    with contextlib.suppress(OSError):
        write_bytes(path, hashlib.sha256(code).digest() + code)
    return code


def _split(entry: bytes) -> tuple[bytes, bytes]:
    """Return the digest of an entry's machine code, with which it starts, and the machine code."""
    size = hashlib.sha256().digest_size
    return entry[:size], entry[size:]
