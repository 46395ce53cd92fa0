"""Models whose layers are not all alike: each layer's scales are of its own rotary embedding and its own heads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from kv_cache.errors import ParetoError
from kv_cache.scales import KVScales
from quant_methods.calibration import kv_pass
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.kv_observer import ATTENTION, observing, unserved_kv
from tests.quant_methods.conftest import TOKENIZER_FILES

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8192,
    "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
ALTERNATING: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 48}
DELTA: dict[str, Any] = {
    "num_hidden_layers": 3, "layer_types": [LINEAR, FULL, LINEAR], "head_dim": 256, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
PLAIN_EMBEDDINGS: dict[str, Any] = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 16}
GEMMA_3 = transformers.Gemma3TextConfig(
    **SHAPE, **ALTERNATING, head_dim=64, query_pre_attn_scalar=64,
    rope_parameters={
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
)  # fmt: skip
GEMMA_4: dict[str, Any] = {**SHAPE, **PLAIN_EMBEDDINGS, "head_dim": 256, "sliding_window": 48}
MODELS: dict[str, tuple[Any, list[tuple[int, int] | None], list[int | None]]] = {
    # A configuration, each layer's (KV heads, head size), and how many pairs of channels it turns.
    "Gemma 2": (
        transformers.Gemma2Config(**SHAPE, **ALTERNATING, head_dim=64, query_pre_attn_scalar=64),
        [(1, 64)] * 4, [32] * 4,
    ),
    "Gemma 3": (GEMMA_3, [(1, 64)] * 4, [32] * 4),
    "Gemma 4": (
        transformers.Gemma4TextConfig(
            **GEMMA_4, global_head_dim=512, num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2,
        ),
        [(1, 256), None] * 2, [128, None] * 2,
    ),
    "Gemma 4 with a shared cache": (
        transformers.Gemma4TextConfig(
            **GEMMA_4, global_head_dim=128, num_global_key_value_heads=2, attention_k_eq_v=True, num_hidden_layers=4,
            layer_types=[SLIDING, FULL] * 2, num_kv_shared_layers=2,
        ),
        [(1, 256), (2, 128), None, None], [128, 64, None, None],
    ),
    "Cohere 2, whose full layers turn nothing": (
        transformers.Cohere2Config(**SHAPE, **ALTERNATING, head_dim=64), [(1, 64)] * 4, [32, 0] * 2
    ),
    "SmolLM3, a layer of which turns nothing": (
        transformers.SmolLM3Config(**SHAPE, num_hidden_layers=2, no_rope_layers=[1, 0]), [(1, 64)] * 2, [32, 0]
    ),
    "StableLM, partial": (transformers.StableLmConfig(**SHAPE, num_hidden_layers=2), [(1, 64)] * 2, [8] * 2),
    "GLM, partial and interleaved": (
        transformers.Glm4Config(**SHAPE, num_hidden_layers=2, head_dim=64), [(1, 64)] * 2, [16] * 2
    ),
    "Phi, partial": (transformers.PhiConfig(**SHAPE, num_hidden_layers=2), [(1, 64)] * 2, [16] * 2),
    "Qwen3-Next": (
        transformers.Qwen3NextConfig(
            **SHAPE, **DELTA, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        [None, (1, 256), None], [None, 32, None],
    ),
    "Qwen3.5": (transformers.Qwen3_5TextConfig(**SHAPE, **DELTA), [None, (1, 256), None], [None, 32, None]),
    "LFM2": (
        transformers.Lfm2Config(
            **SHAPE, num_hidden_layers=3, layer_types=["conv", FULL, "conv"], block_auto_adjust_ff_dim=False
        ),
        [None, (1, 64), None], [None, 32, None],
    ),
}  # fmt: skip


def write(config: Any, tokenizer: Path, folder: Path) -> Any:
    """Write a random model whose keys have a mean: one direction is in every token's embedding."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="pareto_observed").float().eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += 2 * embedding.std() * torch.randn(embedding.shape[1])
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    return model


def tokens(sequences: int, length: int, seed: int) -> Tensor:
    return torch.randint(2, 8192, (sequences, length), generator=torch.Generator().manual_seed(seed))


class Recorder:
    """Keeps each layer's mean key at some positions, [positions, heads, head_dim]."""

    def __init__(self, positions: Tensor) -> None:
        self.positions, self.key = positions, dict[int, Tensor]()

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> None:
        self.key[layer] = key[:, self.positions].float().mean(0)


def calibrated(folder: Path) -> KVScales:
    return kv_pass.calibrate(Decoder(folder), folder, tokens(4, 96, 1), 0).finish()


@pytest.mark.parametrize("name", MODELS)
def test_centres_are_the_means_of_keys_at_far_positions(name: str, tiny_model: Path, tmp_path: Path) -> None:
    config, shapes, rotated = MODELS[name]
    model = write(config, tiny_model, tmp_path / "model")
    scales = calibrated(tmp_path / "model")
    assert [scales.shape(index) for index in range(scales.num_layers)] == shapes
    assert [layer and layer.rotary.rotated for layer in scales.layers] == rotated
    seen = Recorder(torch.tensor([100, 150, 383, 511]))
    with torch.no_grad(), observing(seen):
        model(tokens(24, 512, 2), use_cache=False)
    for index, layer in enumerate(scales.layers):
        if layer is None:
            continue
        centre = layer.rotary.table(512).centre(layer.key_mean, seen.positions)
        wanted = seen.key[index]
        assert wanted.norm() > 0.3 * layer.key_mean.norm()
        error = (centre - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        assert error.max() < 0.25, f"layer {index}: {error}"


def test_layers_of_two_types_have_frequencies_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    write(GEMMA_3, tiny_model, tmp_path / "model")
    scales = calibrated(tmp_path / "model")
    scales.save(tmp_path)
    read = KVScales.load(tmp_path)
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    for found in (scales, read):
        torch.testing.assert_close(found.layer(0).rotary.inv_freq, plain)
        torch.testing.assert_close(found.layer(1).rotary.inv_freq, 1e6 ** (-torch.arange(0, 64, 2) / 64) / 8)
        # One object for all layers of a type: kernels make one table of it.
        assert found.layer(0).rotary is found.layer(2).rotary
        assert found.layer(1).rotary is found.layer(3).rotary


def test_what_gets_no_scales_is_not_run_without_need(tiny_model: Path, tmp_path: Path) -> None:
    """Layers behind the last one with scales are not even read: here their weights are not there."""
    config = MODELS["Gemma 4 with a shared cache"][0]
    write(config, tiny_model, tmp_path / "model")
    decoder, done = Decoder(tmp_path / "model"), list[str]()
    kv_pass.calibrate(decoder, tmp_path / "model", tokens(2, 32, 1), 0, lambda count, what: done.append(what))
    assert done == ["embedding", "block 1/2", "block 2/2"]


def test_inputs_of_each_token_beside_hidden_states_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = transformers.Gemma4TextConfig(
        **SHAPE, head_dim=64, global_head_dim=64, num_hidden_layers=2, layer_types=[SLIDING, FULL],
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=8192,
    )  # fmt: skip
    write(config, tiny_model, tmp_path / "model")
    with pytest.raises(ParetoError, match="gives its blocks inputs of each token beside hidden states"):
        calibrated(tmp_path / "model")


def test_a_model_is_unserved_only_if_no_layer_of_it_is_served() -> None:
    for sizes, reason in (((256, 512), None), ((72, 512), "head size 72"), ((512, 512), "head size 512")):
        config = transformers.Gemma4TextConfig(
            **SHAPE, **PLAIN_EMBEDDINGS, head_dim=sizes[0], global_head_dim=sizes[1], num_hidden_layers=2,
            layer_types=[SLIDING, FULL],
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        found = unserved_kv(model.get_decoder(), config)
        assert (found or "").startswith(reason or "")
        assert bool(found) == bool(reason)


def test_logits_that_a_model_caps_are_capped_here_too() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SHAPE, **ALTERNATING, head_dim=64, query_pre_attn_scalar=1, attn_logit_softcapping=2.0
    )
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=0.3)
        torch.nn.init.normal_(layer.self_attn.k_proj.weight, std=0.3)
    tokens = torch.randint(8192, (2, 100))
    with torch.inference_mode():
        expected = model(tokens).logits
        model.set_attn_implementation(ATTENTION)
        capped = model(tokens).logits
        model.config.attn_logit_softcapping = None
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        plain = model(tokens).logits
    torch.testing.assert_close(capped, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.1
