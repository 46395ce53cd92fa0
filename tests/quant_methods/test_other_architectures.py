"""Decoders that are not built as Llama is go through every kind of recipe."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.stages import find_stages
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.methods.awq import AWQ
from quant_methods.methods.omniquant import OmniQuant
from quant_methods.methods.rotation import Rotate, RotatedSource
from quant_methods.methods.rtn import RTN
from quant_methods.methods.scaling import find_folds
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.recipe import Recipe
from quant_methods.steps import Step
from tests.quant_methods.calibration.test_finite import CALIBRATION, STEPS
from tests.quant_methods.conftest import TOKENIZER_FILES
from tests.quant_methods.serving import serve
from tests.quant_methods.test_engine import divergence

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


SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 8192, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GEMMA: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 64}
GEMMA2 = GEMMA | {"query_pre_attn_scalar": 64, "sliding_window": 64}
# Norms that multiply by 1 + their weight, and by a weight; blocks whose attention and MLP read the same norm.
CONFIGS: dict[str, Any] = {
    "gemma": transformers.GemmaConfig(**SHAPE, **GEMMA),
    "gemma2": transformers.Gemma2Config(**SHAPE, **GEMMA2),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, **GEMMA2),
    "phi": transformers.PhiConfig(**SHAPE),
    "cohere": transformers.CohereConfig(**SHAPE, num_key_value_heads=1),
    "cohere2": transformers.Cohere2Config(**SHAPE, num_key_value_heads=1, sliding_window=64),
}
# The layers that read the norm before attention.
QKV = ("q_proj", "k_proj", "v_proj")
READERS = dict.fromkeys(("gemma", "gemma2", "gemma3"), QKV) | {
    "phi": (*QKV, "fc1"), "cohere": (*QKV, "gate_proj", "up_proj"), "cohere2": (*QKV, "gate_proj", "up_proj"),
}  # fmt: skip
NORM = "model.layers.0.input_layernorm.weight"


def write_other(name: str, tiny_model: Path, folder: Path) -> Path:
    """Write a model whose norms' weights are as after training: with Gemma's initial zeros no scale could be moved."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
                if parameter.dim() == 1:
                    parameter[:4] += 6  # Channels with outliers, which a step finds worth to scale.
            elif parameter.dim() == 2 and "embed" not in key:
                parameter.mul_(4)
    model.bfloat16().save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(tiny_model / file, folder / file)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def other(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other(request.param, tiny_model, tmp_path_factory.mktemp("other") / request.param)


MOVING: dict[str, tuple[Step, ...]] = {
    "awq": (AWQ(exponents=4), RTN(bits=8, group_size=32)),
    "smoothquant": (SmoothQuant(alpha=0.5), RTN(bits=8, group_size=-1, activations="int8")),
    "omniquant": (OmniQuant(epochs=1, rounding=False), RTN(bits=8, group_size=32)),
}


@pytest.mark.parametrize("kind", MOVING)
def test_scales_move_through_other_norms_and_parallel_blocks(
    other: Path, text_file: Path, tmp_path: Path, kind: str
) -> None:
    given = Recipe("test", steps=MOVING[kind], calibration=CALIBRATION, kv_scales=False)
    compress(other, given, tmp_path / "out", text=text_file)
    before, after = (load_file(path / "model.safetensors") for path in (other, tmp_path / "out"))
    # What omniquant starts from may be the best that it finds in so short a training.
    assert kind == "omniquant" or not torch.equal(before[NORM], after[NORM])
    tokens = load_sequences(other, text_file, 2, 32)
    original, found = (load_reference(path)(tokens).logits.detach() for path in (other, tmp_path / "out"))
    assert (found - original).norm() < 0.1 * original.norm()


def test_all_that_reads_a_norm_is_scaled_with_it(other: Path, text_file: Path) -> None:
    decoder = Decoder(other, Source(other))
    hidden = decoder.embed(load_sequences(other, text_file, 2, 32))
    with decoder.loaded(0) as block:
        stages = find_stages(decoder, 0, block, hidden)
        fold = find_folds(decoder, 0, block, hidden, stages)[0]
    assert fold.producer == "input_layernorm"
    assert tuple(name.rsplit(".", 1)[-1] for name in fold.stage.names) == READERS[other.name]
    assert fold.offset == (1 if "gemma" in other.name else 0)


ROTATED = ("gemma", "phi")


@pytest.mark.parametrize("name", ROTATED)
@torch.no_grad()
def test_a_rotated_model_is_the_same_function(name: str, tmp_path: Path) -> None:
    """In float64, before any rounding: weights that are 1 + w, layer norms with biases, parallel blocks."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    for key, parameter in model.named_parameters():
        parameter.add_((0.3 if "norm" in key or key.endswith("bias") else 0.03) * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    source = RotatedSource(Rotate(seed=2), Source(tmp_path / "model"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model", tie_word_embeddings=False)
    rotated = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    rotated.load_state_dict({key: source.turned(key) for key in source.entries})
    source.check_block(rotated.model.layers[0], config)
    tokens = torch.randint(8192, (2, 40), generator=torch.Generator().manual_seed(1))
    wanted, found = model.double()(tokens).logits, rotated(tokens).logits
    # Norms compute in float32 in some models.
    assert (found - wanted).abs().max() < {"gemma": 1e-4, "phi": 1e-10}[name] * wanted.abs().max()
    assert not torch.allclose(rotated.lm_head.weight, model.lm_head.weight, atol=1e-3)


@pytest.fixture
def rotatable(other: Path) -> Path:
    if other.name not in ROTATED:
        pytest.skip("cannot be rotated")
    return other


def test_rotation_takes_outliers_of_other_norms_away(rotatable: Path, text_file: Path, tmp_path: Path) -> None:
    errors = {}
    tokens = load_sequences(rotatable, text_file, 2, 32)
    original = load_reference(rotatable)(tokens).logits.detach()
    for kind, steps in {"rotated": (Rotate(),), "plain": ()}.items():
        given: tuple[Step, ...] = (*steps, RTN(bits=8, group_size=-1, activations="int8"))
        compress(
            rotatable, Recipe("test", steps=given, calibration=CALIBRATION, kv_scales=False), tmp_path / kind,
            text=text_file,
        )  # fmt: skip
        found = load_reference(tmp_path / kind)(tokens).logits.detach()
        errors[kind] = (found - original).norm() / original.norm()
    assert errors["rotated"] < 0.1
    assert errors["rotated"] < errors["plain"]


def test_a_norms_bias_needs_a_place(other: Path) -> None:
    if other.name != "phi":
        pytest.skip("has no biases")
    source = Source(other)
    del source.entries["model.layers.1.mlp.fc1.bias"]
    with pytest.raises(ParetoError, match=r"no model.layers.1.mlp.fc1.bias to take in that of model.layers.1.input_l"):
        RotatedSource(Rotate(), source)


def test_what_cannot_be_rotated_is_said_before_any_work(other: Path, text_file: Path, tmp_path: Path) -> None:
    if other.name in ROTATED:
        pytest.skip("can be rotated")
    given = Recipe("test", steps=(Rotate(), RTN(bits=4, group_size=64)), calibration=CALIBRATION, kv_scales=False)
    with pytest.raises(ParetoError, match=r"rotate does not serve .*; use a recipe without rotate: gptq-w4") as caught:
        compress(other, given, tmp_path / "out", text=text_file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_serves_what_was_rotated(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Stock vLLM computes what PyTorch does: it takes a head apart from Gemma's embedding, and one with biases."""
    tokens = load_sequences(tiny_model, text_file, 2, 48)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    (tmp_path / "served").mkdir()
    given = Recipe("test", steps=(Rotate(), RTN(bits=4, group_size=64)), calibration=CALIBRATION, kv_scales=False)
    for name in ROTATED:
        write_other(name, tiny_model, tmp_path / "models" / name)
        compress(tmp_path / "models" / name, given, tmp_path / name, text=text_file)
    serve(tmp_path / "tokens.json", tmp_path / "served", [tmp_path / name for name in ROTATED], plugin=False)
    for name in ROTATED:
        result = torch.load(tmp_path / "served" / f"{name}.pt")
        assert result.get("error") is None, name
        original, expected = (
            load_reference(path)(tokens).logits[:, :-1].log_softmax(-1).detach()
            for path in (tmp_path / "models" / name, tmp_path / name)
        )
        assert divergence(expected, result["logits"].log_softmax(-1)) < 0.1 * divergence(expected, original), name
