"""Importing Locust as a library, without its patching of the standard library."""

from __future__ import annotations

import os

_SWITCH = "LOCUST_SKIP_MONKEY_PATCH"


def import_locust() -> None:
    """Import Locust so that it leaves the standard library of this process alone.

    Everything in this room uses gevent's own sockets, so gevent's monkey-patching, which Locust does when it is
    imported, is not needed; and it is unsafe in a process that has imported ssl or threading already. Under the
    ``locust`` command Locust is imported, and has patched, before any of our modules: then this does nothing.
    """
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        import locust  # noqa: F401
    finally:
        # Locust in a child process must still patch itself.
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
