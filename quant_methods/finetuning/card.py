"""The model card of an adapter, or of a checkpoint that it was merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kv_cache.atomic import write_bytes


def write_card(folder: Path, about: dict[str, Any]) -> None:
    """Write ``README.md``.

    Args:
        folder: of the result.
        about: what ``pareto_finetuning.json`` says.

    """
    data, settings = about["data"], about["settings"]
    values = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    merged = "The adapter is merged, and kept in `adapter/`." if about["merged"] else "This is an adapter of peft's."
    start = about["start_from"]
    began = "" if start is None else f"It began as what quantization took from `{start['name']}`. "
    library = "transformers" if about["merged"] else "peft"
    text = f"""---
library_name: {library}
base_model: {about["model"]["name"]}
tags: [lora, vllm-pareto]
---
# {about["model"]["name"]}, fine-tuned

{merged} {began}The state after step {about["kept_step"]} of {about["steps"]} was kept, the best on {data["held_out"]}
examples that it never saw: a loss of {about["before"]:.4f} before, {about["after"]:.4f} after.

| setting | value |
| --- | --- |
{values}

Data: {data["training"]:,} examples of `{data["source"]}`, SHA-256 `{data["sha256"]}`. Base model: SHA-256
`{about["model"]["sha256"]}`. Versions: {versions}. Every figure of the run is in `training_log.jsonl`.

The licences of the base model and of the data apply to what was learnt from them.
"""
    write_bytes(folder / "README.md", text.encode())
