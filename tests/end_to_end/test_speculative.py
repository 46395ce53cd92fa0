"""Speculative decoding with a quantized KV cache on CPU: the same answers, and scales of each model's own."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_cache.scales import KVScales
from tests.end_to_end.engines import VOCABULARY, engine, prompts, run, runner, write_model, write_scales
from vllm_ext.codes_backend import CodesLayer

pytestmark = pytest.mark.engine

NEW = 200
TEXTS = [p[:n] for p, n in zip(prompts(3, 150, seed=3, vocabulary=VOCABULARY), (40, 150, 97), strict=True)]
SETTINGS = {"skip_tokenizer_init": True, "max_num_batched_tokens": 128}
WIDTH = 192


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def target(models):
    return write_model(models / "target", layers=3)


@pytest.fixture(scope="module")
def near(models, target):
    """A draft model that often agrees with the target, of the same shape, with scales that differ."""
    shutil.copytree(target, models / "near")
    torch.manual_seed(1)
    tensors = load_file(target / "model.safetensors")
    noisy = {n: t + 0.03 * t.std() * torch.randn_like(t) if t.ndim == 2 else t for n, t in tensors.items()}
    save_file(noisy, models / "near" / "model.safetensors", {"format": "pt"})
    scales = KVScales.load(target)
    for layer in scales.layers:
        layer.value_size.mul_(1.25)
    scales.save(models / "near")
    return models / "near"


def write_eagle(folder, target, method):
    """Write a random head that drafts from the target's hidden states."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)

    def weight(rows, columns):
        return 0.08 * torch.randn(rows, columns, generator=generator)

    config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1}
    inputs, inner = (WIDTH, "layers.0") if method == "eagle" else (2 * WIDTH, "midlayer")
    tensors = {"fc.weight": weight(WIDTH, WIDTH * (2 if method == "eagle" else 3))}
    for local, (rows, columns) in {
        "self_attn.q_proj": (256, inputs), "self_attn.k_proj": (128, inputs), "self_attn.v_proj": (128, inputs),
        "self_attn.o_proj": (WIDTH, 256), "mlp.gate_proj": (256, WIDTH), "mlp.up_proj": (256, WIDTH),
        "mlp.down_proj": (WIDTH, 256),
    }.items():  # fmt: skip
        tensors[f"{inner}.{local}.weight"] = weight(rows, columns)
    norms = ["post_attention_layernorm"]
    if method == "eagle3":
        norms += ["hidden_norm", "input_layernorm"]
        tensors |= {"norm.weight": torch.ones(WIDTH), "lm_head.weight": weight(VOCABULARY, WIDTH)}
        config |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": VOCABULARY}
    tensors |= {f"{inner}.{norm}.weight": torch.ones(WIDTH) for norm in norms}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def alone(target):
    """What the target answers without drafts."""
    with engine(target, "int4_per_head", **SETTINGS) as llm:
        return run(llm, TEXTS, NEW)


def accepted(llm):
    """Return how many drafts were made and how many were accepted."""
    found = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]


def same(found, wanted):
    """Whether answers are equal; their log-probabilities too, but for the rounding of larger batches."""
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    torch.testing.assert_close(
        torch.tensor([p for _, p in found]), torch.tensor([p for _, p in wanted]), atol=2e-3, rtol=0
    )


def layers(llm):
    """Return the attention layers by name."""
    return dict(runner(llm).vllm_config.compilation_config.static_forward_context)


@pytest.mark.serves("speculative decoding, draft models")
def test_a_draft_model_has_scales_of_its_own(target, near, alone):
    """Some drafts are accepted and some are not, whose codes are written over: the answers stay what they were."""
    speculative = {"method": "draft_model", "model": str(near), "num_speculative_tokens": 4}
    with engine(target, "int4_per_head", speculative_config=speculative, **SETTINGS) as llm:
        same(run(llm, TEXTS, NEW), alone)
        drafts, taken = accepted(llm)
        assert 0.2 * drafts < taken < 0.9 * drafts
        found = layers(llm)
        assert len(found) == 6
        for name, layer in found.items():
            folder = near if name.startswith("draft_model.") else target
            index = int(name.partition("layers.")[2][0])
            assert torch.equal(layer.impl.scales_of(layer).value_size, KVScales.load(folder).layer(index).value_size)


@pytest.mark.serves("speculative decoding, draft models")
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["int4_per_head", "mixed_per_head"])
def test_a_draft_model_of_another_shape(target, models, alone, dtype, capfd):
    """With other heads, as many as one rank of the target would have. Nobody chose bits for its layers."""
    folder = models / f"other-{dtype}"
    write_model(folder, head_dim=64, heads=2, kv_heads=1, layers=2, seed=1)
    write_scales(target, 3, 2, 64, [(4, 4)] * 3)
    speculative = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    with engine(target, dtype, speculative_config=speculative, **SETTINGS) as llm:
        same(run(llm, TEXTS, NEW), alone)
        drafting = [layer for name, layer in layers(llm).items() if name.startswith("draft_model.")]
        assert [isinstance(layer.impl, CodesLayer) for layer in drafting] == [dtype == "int4_per_head"] * 2
    said = "what drafts keeps its keys and values in 16 bits: --kv-cache-dtype mixed_per_head needs bits for each layer"
    assert (said in capfd.readouterr().err) == (dtype == "mixed_per_head")


@pytest.mark.long
def test_a_draft_model_alone_may_be_coded(target, near):
    with engine(target, **SETTINGS) as llm:
        plain = run(llm, TEXTS, NEW)
    speculative = {"method": "draft_model", "model": str(near), "num_speculative_tokens": 4}
    speculative["kv_cache_dtype"] = "int8_per_head"
    with engine(target, speculative_config=speculative, **SETTINGS) as llm:
        same(run(llm, TEXTS, NEW), plain)
        coded = {name for name, layer in layers(llm).items() if isinstance(layer.impl, CodesLayer)}
        assert coded == {f"draft_model.model.layers.{i}.self_attn.attn" for i in range(3)}


@pytest.mark.serves("speculative decoding, EAGLE and EAGLE3 (their layers in 16 bits)")
@pytest.mark.long
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_what_has_no_scales_keeps_16_bits(target, models, alone, method, capfd):
    """16 bits, or as many as the model has."""
    speculative = {"method": method, "num_speculative_tokens": 3}
    speculative["model"] = str(write_eagle(models / method, target, method))
    with engine(target, "int4_per_head", speculative_config=speculative, **SETTINGS) as llm:
        same(run(llm, TEXTS, NEW), alone)
        assert accepted(llm)[0] > 100
        (drafting,) = [layer for name, layer in layers(llm).items() if "layers.3." in name]
        assert drafting.kv_cache.dtype == torch.float32
    assert f"{method} drafts from the model's hidden states and has no scales of its own" in capfd.readouterr().err


@pytest.mark.serves("speculative decoding, n-grams")
@pytest.mark.long
def test_ngrams(target, alone):
    """In a process of its own: vLLM looks into all modules when an engine starts, and those that this loads fail it."""
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(target, "int4_per_head", apart=True, speculative_config=speculative, **SETTINGS) as llm:
        same(run(llm, TEXTS, NEW), alone)
        drafts, taken = accepted(llm)
        assert drafts > taken > 0


@pytest.mark.serves("speculative decoding, MTP (its layers in 16 bits)")
@pytest.mark.long
def test_multi_token_prediction(models, target, capfd):
    """MiMo's extra layer is numbered after the model's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = models / "mimo"
    torch.manual_seed(4)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=1024, initializer_range=0.08, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    first, extra = "model.layers.0.", "model.mtp_layers.0."
    tensors |= {name.replace(first, extra): t.clone() for name, t in tensors.items() if name.startswith(first)}
    tensors[f"{extra}input_proj.weight"] = 0.08 * torch.randn(WIDTH, 2 * WIDTH)
    tensors |= {f"{extra}{norm}_layernorm.weight": torch.ones(WIDTH) for norm in ("token", "hidden", "final")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    write_scales(folder, 2, 1, 64)
    answers = []
    for speculative in (None, {"method": "mtp", "num_speculative_tokens": 1}):
        with engine(folder, "int4_per_head", speculative_config=speculative, **SETTINGS) as llm:
            answers.append(run(llm, TEXTS, NEW))
            assert [isinstance(layer.impl, CodesLayer) for layer in layers(llm).values()] == (
                [True, True] + [False] * (speculative is not None)
            )
    same(*reversed(answers))
    assert "mtp drafts from the model's hidden states" in capfd.readouterr().err
