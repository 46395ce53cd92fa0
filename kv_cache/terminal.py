"""Consoles that print text as it is: a name in brackets is a name, and no markup of rich's."""

from __future__ import annotations

from rich.console import Console


def console(*, stderr: bool = False, piped_width: int | None = None) -> Console:
    """Return a console.

    Args:
        stderr: print there.
        piped_width: columns where it is no terminal and has no width of its own; None for rich's 80.

    """
    made = Console(stderr=stderr, markup=False, emoji=False)
    if piped_width is not None and not made.is_terminal:
        made = Console(stderr=stderr, markup=False, emoji=False, width=piped_width)
    return made
