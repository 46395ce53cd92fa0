"""What tests share: a decoder small enough to compress in a second, with the reference model's tokenizer."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quant_methods.embedded import MODELS
from quant_methods.handlers import HANDLERS, Handler
from tests.quant_methods.random_layers import Parts, quantize

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Llama: 3 blocks, width 128, 2 heads on 1 KV head, bfloat16, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=8192,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copyfile(MODELS / "ref-7m" / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred tokens of text that differ from window to window."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        " ".join(f"The {i}th parcel weighs {i * 37 % 101} grams and left on day {i % 7}." for i in range(200))
    )
    return path


@pytest.fixture
def parts_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make compress carry out the tests' own step."""
    monkeypatch.setitem(HANDLERS, Parts, Handler(quantize))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep samples out of the user's cache, and share them between tests."""
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path_factory.getbasetemp() / "pareto-cache"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread only costs barriers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
