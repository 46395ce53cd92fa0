"""What this package's plots share: colours, marks, names of layers, and the way to a PNG."""

from __future__ import annotations

import io
import re
from typing import Any

# Okabe and Ito's colours: distinct for every kind of colour vision, and by lightness.
COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#000000", "#888888")
MARKERS = "ovs^Dph<"
# More units than this, and only blocks are named.
MOST_LABELS = 48


def png(figure: Any) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    # No date or version inside: the same plot is the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def short_name(name: str) -> str:
    """Return ``0 q k v`` for ``model.layers.0.self_attn.{q_proj,k_proj,v_proj}``."""
    block = next((part for part in name.split(".") if part.isdigit()), "")
    local = re.sub(r"_proj\b", "", name.rpartition(".")[2])
    return f"{block} {re.sub(r'[{},]+', ' ', local).strip()}"


def label_places(names: list[str]) -> tuple[list[int], list[str]]:
    """Return where to put which labels below an axis of layers: all, or only blocks' numbers if they are many."""
    if len(names) <= MOST_LABELS:
        return list(range(len(names))), names
    blocks = [name.split()[0] for name in names]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    return starts, [blocks[i] for i in starts]
