"""The error that means bad input or an unusable endpoint, reported to the user as one line."""

from __future__ import annotations


class LoadTestError(Exception):
    """A load test cannot start or go on; the message says in one line what is wrong and what to do."""
