import json
from pathlib import Path

import pytest
import torch

from quant_methods.distillation import student
from quant_methods.embedded import MODELS

REF = MODELS / "ref-7m"
SHAPE = """
hidden_size: 64
intermediate_size: 96
num_hidden_layers: 3
num_attention_heads: 4
num_key_value_heads: 2
head_dim: 64
"""


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A tiny model with random weights that are large enough for its layers to matter, and ref-7m's tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "shape.yaml").write_text(SHAPE)
    model = student.fresh(REF, folder / "shape.yaml", 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise
    student.save(model, REF, folder / "model", torch.float32)
    return folder / "model"


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [
        f"The number {n} comes after {n - 1}, and its double is {2 * n}; thrice it is {3 * n}." for n in range(300)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = [
        [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}, gladly."}]
        for n in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    return path
