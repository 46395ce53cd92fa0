"""Decoders that are not built as Llama is go through every kind of recipe."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from quant_methods.compress import compress
from quant_methods.methods.omniquant import OmniQuant
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Recipe, Step
from tests.quant_methods.calibration.test_finite import CALIBRATION, STEPS
from tests.quant_methods.conftest import TOKENIZER_FILES

KINDS: dict[str, tuple[Step, ...]] = STEPS | {
    "omniquant": (OmniQuant(epochs=1), RTN(bits=4, group_size=32)),
}


@pytest.fixture(scope="module")
def opt(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It adds embeddings of positions to whatever enters its blocks, and hands tokens on without their sequences."""
    folder = tmp_path_factory.mktemp("opt") / "model"
    vocabulary = transformers.AutoConfig.from_pretrained(tiny_model).vocab_size
    config = transformers.OPTConfig(
        hidden_size=128, ffn_dim=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=vocabulary,
        word_embed_proj_dim=128, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tiny_model / name).is_file():
            shutil.copy(tiny_model / name, folder / name)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_opt(opt: Path, text_file: Path, tmp_path: Path, kind: str) -> None:
    given = Recipe("test", steps=KINDS[kind], calibration=CALIBRATION, kv_scales=not KINDS[kind])
    report = compress(opt, given, tmp_path / "out", text=text_file)
    assert (tmp_path / "out" / "config.json").is_file()
    assert len(report.layers) == (12 if KINDS[kind] else 0)
