"""Bytes as people read them: one way for all commands and the report."""


def readable(count: float) -> str:
    """Return a number of bytes with four digits in the largest binary unit that leaves it at least 1, up to GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
