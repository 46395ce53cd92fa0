"""gpt-oss' KV scales: sinks, windows in every other layer, YaRN and a mixture of experts, from the command on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from kv_cache.calibration import KVCalibrator, LayerShape
from kv_cache.scales import KVScales
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.kv_observer import kv_rotary, observing
from quant_methods.calibration.kv_pass import FIRST_TOKENS, first_tokens, kv_sequences
from quant_methods.calibration.text_source import load_tokenizer
from quant_methods.formats.foreign_formats import unpack_mxfp4
from tests.quant_methods.conftest import TOKENIZER_FILES
from vllm_ext.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = GptOssConfig(
    hidden_size=128, intermediate_size=64, num_hidden_layers=3, vocab_size=8192, max_position_embeddings=512,
    bos_token_id=0, eos_token_id=1, pad_token_id=0, num_attention_heads=4, num_key_value_heads=1, head_dim=64,
    num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt-oss"
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG)
    for layer in made.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=2, std=2)
    made.bfloat16().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tiny_model / name, folder / name)
    return folder


def whole_models_scales(model: Path, tokens: torch.Tensor) -> KVScales:
    """The scales by a pass of transformers' model, all of it in memory."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="pareto_observed")
    rotary = kv_rotary(whole.get_decoder(), whole.config)
    torch.testing.assert_close(rotary.inv_freq, whole.model.rotary_emb.inv_freq)
    plain = 150000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert not torch.allclose(rotary.inv_freq, plain, rtol=0.1)  # YaRN's frequencies are others.
    calibrator = KVCalibrator([LayerShape(1, 64, rotary)] * 3)
    with torch.no_grad(), observing(calibrator):
        whole(tokens, use_cache=False)
        whole(first_tokens(load_tokenizer(model), tokens, 0), use_cache=False)
    return calibrator.finish()


def test_scales_are_those_of_the_whole_model(
    model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", model, "--recipe", "kv-scales", "--out", tmp_path / "out", "--text", text_file]
    words += ["--num-calibration-samples", "6", "--calibration-length", "48"]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    found = KVScales.load(tmp_path / "out")
    assert found.metadata["calibration_tokens"] == 6 * 48 + FIRST_TOKENS
    expected = whole_models_scales(model, kv_sequences(model, text_file, 6, 48))
    for layer, same in zip(found.layers, expected.layers, strict=True):
        for name in ("key_mean", "key_first", "value_size"):
            one, other = getattr(layer, name), getattr(same, name)
            assert (one - other).norm() < 0.03 * other.norm(), name
        square, wanted = (x.key_transform.mT @ x.key_transform for x in (layer, same))
        assert (square - wanted).norm() < 0.1 * wanted.norm()


def test_bits_are_found_for_a_budget(
    model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", model, "--recipe", "kv-scales", "--kv-budget", "4.5bits", "--out", tmp_path / "out"]
    words += ["--text", text_file, "--num-calibration-samples", "6", "--calibration-length", "48"]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    bits = KVScales.load(tmp_path / "out").bits
    assert bits is not None
    assert len(bits) == 3


def test_experts_in_mxfp4_are_read_back(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the real checkpoints store them; a twin stores what the codes mean."""
    folder, twin = tmp_path / "mxfp4", tmp_path / "twin"
    shutil.copytree(model, folder)
    shutil.copytree(model, twin)
    tensors = load_file(model / "model.safetensors")
    plain = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 122, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = unpack_mxfp4(blocks, scales).mT.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    found = Decoder(folder)
    for name, expected in plain.items():
        assert torch.equal(found.source.read(name), expected), name
    made = []
    for checkpoint in (folder, twin):
        out = tmp_path / f"{checkpoint.name}-out"
        words = ["compress", checkpoint, "--recipe", "kv-scales", "--out", out, "--num-calibration-samples", "4"]
        assert main([*map(str, words), "--calibration-length", "32"]) == 0, capsys.readouterr().err
        made.append(KVScales.load(out))
    for one, other in zip(*(scales.layers for scales in made), strict=True):
        assert torch.equal(one.key_transform, other.key_transform)
        assert torch.equal(one.key_mean, other.key_mean)
