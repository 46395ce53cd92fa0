"""File descriptors: every request in flight needs one for its connection, and shells often allow 1024."""

from __future__ import annotations

import errno
import resource

# What the process or the machine of the load generator has run out of; none of it is the server's fault.
_OUR_OWN = {
    errno.EMFILE: "this process has no file descriptor left; raise `ulimit -n`, or use fewer users",
    errno.ENFILE: "this machine has no file descriptor left; use fewer users",
    errno.EADDRNOTAVAIL: "this machine has no port left for another connection; use fewer users or more machines",
}


def raise_limit() -> int:
    """Raise the soft limit of open files as far as the hard one allows; returns the limit that holds then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft
    return hard


def shortage(error: BaseException) -> str | None:
    """Return what the load generator has run out of and what to do, or None when ``error`` is something else."""
    return _OUR_OWN.get(error.errno or 0) if isinstance(error, OSError) else None
