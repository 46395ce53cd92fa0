"""Globs over module names that a user gives: one that matches nothing is a typing error, and is refused.

Without this, a layer that was to be left alone would be quantized in silence.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from kv_cache.errors import ParetoError

# What recipes ignore unless told otherwise; not every model has one that is called so.
ALWAYS = ("lm_head",)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a module's full name, or its last parts, match one of the globs.

    ``lm_head`` and ``down_proj`` match by last part, ``model.layers.0.*`` by full name.
    """
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns)


def check_patterns(what: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a glob that matches no layer.

    Args:
        what: where the globs were given, for the message.
        patterns: the globs.
        names: full names of the layers that they may match.

    Raises:
        ParetoError: with the glob, and with names that resemble it.

    """
    for pattern in patterns:
        if pattern in ALWAYS or any(matches(name, (pattern,)) for name in names):
            continue
        if pattern.startswith("re:"):
            raise ParetoError(
                f"{what}: {pattern!r} is a regular expression, and patterns here are globs over module names; write "
                f"{pattern[3:].replace('.*', '*')!r} or the like"
            )
        ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
        below = [name for name in names if matches(name, (f"{pattern}.*",))]
        if below:
            hint = f"it names modules that hold layers; write {pattern + '.*'!r} for all of them"
        else:
            near = difflib.get_close_matches(pattern, ends, 3) + difflib.get_close_matches(pattern, names, 2, 0.8)
            hint = f"near it: {', '.join(dict.fromkeys(near))}" if near else f"layers end in {', '.join(ends)}"
        raise ParetoError(f"{what}: {pattern!r} matches no layer of this model; {hint}")
