"""The model card of what a training made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kv_cache.atomic import write_bytes


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Return a table of Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def write_card(
    folder: Path,
    *,
    title: str,
    labels: dict[str, str],
    text: str,
    settings: dict[str, Any],
    data: str,
    versions: dict[str, str],
    result: str,
    learnt_from: str,
) -> None:
    """Write ``README.md``.

    Args:
        folder: of the result.
        title: of the card.
        labels: what catalogues of models read, by name; values are YAML.
        text: what was done and what came of it, in Markdown.
        settings: with what.
        data: what on, and from which model.
        versions: of libraries, by name.
        result: name of the file that says the rest.
        learnt_from: whose licence holds besides that of the data, such as ``the teacher``.

    """
    head = "\n".join(f"{name}: {value}" for name, value in labels.items())
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    card = f"""---
{head}
---
# {title}

{text}

{table(("setting", "value"), list(settings.items()))}

{data}

Versions: {libraries}. The rest is in `{result}`, every figure of the run in `training_log.jsonl`. The licences of
{learnt_from} and of the data apply to what was learnt from them.
"""
    write_bytes(folder / "README.md", card.encode())
