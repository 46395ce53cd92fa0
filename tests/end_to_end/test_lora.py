"""LoRA adapters over weights in the format of ours, without and with a quantized KV cache, through vLLM on CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.native_format import NativeConfig, pack
from tests.end_to_end.engines import engine, environment, prompts, write_scales
from tests.quant_methods.random_layers import random_layer

pytestmark = pytest.mark.engine

VOCABULARY = 512
NEW = 24
SHAPES = {
    "self_attn.q_proj": (256, 128),
    "self_attn.k_proj": (128, 128),
    "self_attn.v_proj": (128, 128),
    "self_attn.o_proj": (128, 256),
    "mlp.gate_proj": (192, 128),
    "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}
# One a layer; in the last one, layers that vLLM merges are stored differently.
FORMS = [
    flat_form(4, 32, symmetric=False),
    flat_form(4, table=True, sparse=True, columns=3),
    flat_form(3, 32, symmetric=False, columns=4, rank=2),
    flat_form(8, -1, activations="int8"),
    flat_form(6, 64, activations="int8", columns=2),
    flat_form(5, 32, sparse=True, columns=5, column_bits=8),
]
OTHER = {"self_attn.k_proj": flat_form(2, 32, symmetric=False, rank=1), "mlp.up_proj": flat_form(7, table=True)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Write a random Llama that has every kind of bulk and everything that lies beside one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("lora") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=len(FORMS), num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=1024,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors, forms = load_file(folder / "model.safetensors"), {}
    for layer, form in enumerate(FORMS):
        for seed, (local, (rows, inputs)) in enumerate(SHAPES.items()):
            name = f"model.layers.{layer}.{local}"
            forms[name] = OTHER.get(local, form) if layer == len(FORMS) - 1 else form
            linear = random_layer(forms[name], rows, inputs, seed + 10 * layer)
            del tensors[f"{name}.weight"]
            tensors |= pack(name, linear)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": NativeConfig(forms).to_dict()}))
    return write_scales(folder, len(FORMS), 2, 64)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Write two adapters of other ranks and scalings; the second one is for some layers only."""
    return [
        write_adapter(tmp_path_factory.mktemp("adapter"), 8, 16.0, list(SHAPES), seed=1),
        write_adapter(tmp_path_factory.mktemp("adapter"), 4, 12.0, ["self_attn.v_proj", "mlp.down_proj"], seed=2),
    ]


def write_adapter(folder, rank, alpha, locals_, seed):
    """Write an adapter as peft does."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(len(FORMS)):
        for local in locals_:
            rows, inputs = SHAPES[local]
            name = f"base_model.model.model.layers.{layer}.{local}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / (4 * rank)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": sorted(local.rpartition(".")[2] for local in locals_), "base_model_name_or_path": "model",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def reference(model, adapter=None, dtype=torch.float32):
    """Return the dequantized model, an adapter's ``scaling * x A^T B^T`` added to the outputs of its layers."""
    from quant_methods.checkpoints.reference import load_reference

    found = load_reference(model)
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / config["r"]
        tensors = {name: tensor.float() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
        modules = dict(found.named_modules())
        for name in {key.split(".lora_")[0] for key in tensors}:
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            add_adapter(modules[name.removeprefix("base_model.model.")], scaling * b @ a)
    return found.to(dtype)


def add_adapter(module, change):
    """Add to a layer's outputs the product of a matrix with its inputs as they come, not as serving rounds them."""

    def enter(module, args):
        module.inputs = args[0]

    module.register_forward_pre_hook(enter, prepend=True)
    module.register_forward_hook(lambda module, args, output: output + module.inputs @ change.to(output).T)


def wanted(model, texts, adapter, dtype):
    """Return the log-probabilities of the last NEW tokens of texts, [texts, NEW]."""
    with torch.no_grad():
        scores = reference(model, adapter, dtype)(torch.tensor(texts)).logits[:, -NEW - 1 : -1].float().log_softmax(-1)
    return scores.gather(2, torch.tensor(texts)[:, -NEW:, None]).squeeze(2)


def served(llm, texts, adapters):
    """Return each text with the NEW tokens that follow, and their log-probabilities, all in one batch.

    Args:
        llm: the engine.
        texts: token lists.
        adapters: a number and a folder for each text; no folder: no adapter.

    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = llm.generate(
        [{"prompt_token_ids": text} for text in texts],
        # Drawn, so that tokens of little probability are among them.
        SamplingParams(max_tokens=NEW, temperature=1, ignore_eos=True, logprobs=0, detokenize=False),
        lora_request=[folder and LoRARequest(str(number), 1 + number, str(folder)) for number, folder in adapters],
        use_tqdm=False,
    )
    made = [list(output.outputs[0].token_ids) for output in outputs]
    found = [
        [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        for output, ids in zip(outputs, made, strict=True)
    ]
    return [text + ids for text, ids in zip(texts, made, strict=True)], torch.tensor(found)


@pytest.mark.serves("LoRA adapters over every weight format")
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8_per_head"])
def test_adapters_add_their_products_to_every_format(model, adapters, kv_cache_dtype):
    """Two adapters and none in one batch: each text has the log-probabilities of the model that its adapter makes."""
    texts = prompts(6, 64, seed=3, vocabulary=VOCABULARY)
    chosen = [0, 1, None, 1, 0, None]
    with (
        environment(VLLM_CPU_INT4_W4A8="0"),
        engine(
            # On CPU vLLM 0.32 gives texts without an adapter that of the last slot, whatever the weights are: a third
            # slot stays empty.
            model, kv_cache_dtype, dtype="bfloat16", enable_lora=True, max_loras=3, max_lora_rank=8,
            max_num_batched_tokens=96, skip_tokenizer_init=True,
        ) as llm,
    ):  # fmt: skip
        if kv_cache_dtype != "auto":
            # Scales are the base model's own: they were there before any adapter.
            assert llm.llm_engine.vllm_config.additional_config["pareto_kv_scales"] == str(model)
        texts, found = served(llm, texts, [(i or 0, None if i is None else adapters[i]) for i in chosen])
    for number, adapter in [(None, None), *enumerate(adapters)]:
        rows = [i for i, one in enumerate(chosen) if one == number]
        part = [texts[i] for i in rows]
        exact, rounded = (wanted(model, part, adapter, dtype) for dtype in (torch.float32, torch.bfloat16))
        others = [wanted(model, part, other, torch.float32) for other in (None, *adapters) if other is not adapter]
        noise, error = (rounded - exact).abs().mean(), (found[rows] - exact).abs().mean()
        apart = min((other - exact).abs().mean() for other in others)
        print(f"adapter {number}: bfloat16 {noise:.4f}, served {error:.4f}, other adapters {apart:.4f}")
        # 8-bit codes of keys and values add about as much again as bfloat16.
        assert error < (2 if kv_cache_dtype == "auto" else 3) * noise
        assert apart > 8 * noise
