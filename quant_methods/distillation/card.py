"""The model card of a student: whom it learnt from, what on, how, and how far it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kv_cache.atomic import write_bytes


def write_card(folder: Path, about: dict[str, Any], before: dict[str, float], after: dict[str, float]) -> None:
    """Write ``README.md`` into a student's folder.

    Args:
        folder: of the checkpoint.
        about: what ``Job.describe`` says, with the teacher's description.
        before: figures of the held-out sequences at the start.
        after: and of the state that was kept.

    """
    teacher, data, settings = about["teacher"], about["data"], about["settings"]
    rows = "\n".join(f"| {name} | {before[name]:.4f} | {after[name]:.4f} |" for name in after)
    codes = []
    if about["weight_bits"]:
        bits, group = about["weight_bits"]
        codes.append(f"weights rounded to {bits} bits in groups of {group}")
    if about["kv_bits"]:
        codes.append("keys and values read from codes of {} and {} bits".format(*about["kv_bits"]))
    lived = f"It learnt with {' and '.join(codes)}.\n\n" if codes else ""
    values = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    text = f"""---
library_name: transformers
tags: [distillation, vllm-pareto]
---
# Distilled from {teacher["teacher"]}

The student was {about["student"]["how"]}; the teacher was {teacher["kind"]}. The state after step
{about["kept_step"]} of {about["steps"]} was kept, the best on {data["held_out"]} sequences that it never saw.

{lived}| held out | before | after |
| --- | --- | --- |
{rows}

KL is the teacher's from the student in nats a token; all at temperature 1.

| setting | value |
| --- | --- |
{values}

Data: {data["num_samples"]:,} sequences of {data["length"]:,} tokens of `{data["source"]}`, SHA-256 of the tokens
`{data["tokens_sha256"]}`. Versions and the rest are in `pareto_distillation.json`, every figure of the run in
`training_log.jsonl`. The licences of the teacher and of the data apply to what was learnt from them.
"""
    write_bytes(folder / "README.md", text.encode())
