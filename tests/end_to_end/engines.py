"""Engines in this process, so that a test can look into their pages and scheduler."""

import contextlib
import gc
import os
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
VOCABULARY = 512
REF_7M = ROOT / "quant_methods" / "models" / "ref-7m"


@contextlib.contextmanager
def environment(**values):
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@cache
def freeze_what_vllm_imports():
    from vllm import LLM

    gc.collect()
    gc.freeze()
    return LLM


@contextlib.contextmanager
def in_this_process():
    """Let vLLM start one engine here, and look for garbage once, among what is younger than the first engine.

    vLLM has all objects looked at eight times an engine, and thaws them each time. Most are what importing it left, and
    looking at them takes most of the time of a small engine.
    """
    names = ("collect", "freeze", "unfreeze")
    before = [getattr(gc, name) for name in names]
    freeze_what_vllm_imports()
    for name in names:
        setattr(gc, name, lambda *generation: 0)
    try:
        with environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"):
            yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(gc, name, function)
        gc.collect()


@contextlib.contextmanager
def engine(model, kv_cache_dtype="auto", apart=False, **settings):
    """Start an engine in this process, or apart from it; its configuration is small, and the same for every dtype."""
    settings = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "seed": 0} | settings
    if not torch.cuda.is_available():
        settings = {"kv_cache_memory_bytes": 128 << 20} | settings  # All of it is written with zeros.
    with environment(VLLM_ENABLE_V1_MULTIPROCESSING="1") if apart else in_this_process():
        from vllm import LLM

        llm = LLM(str(model), kv_cache_dtype=kv_cache_dtype, disable_log_stats=False, **settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def kv_caches(llm):
    """Return the layers' pages by layer name."""
    context = runner(llm).vllm_config.compilation_config.static_forward_context
    return {name: layer.kv_cache for name, layer in context.items() if hasattr(layer, "kv_cache")}


def run(llm, prompts, tokens, prompt_logprobs=None):
    """Return the greedy tokens and their log-probabilities, one pair of lists a prompt."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=prompt_logprobs, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    result = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        result.append((ids, [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]))
    return result


def prompts(count, length, seed=0, vocabulary=8192):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (count, length), generator=generator).tolist()


def write_scales(model, layers, kv_heads, head_dim, bits=None):
    """Give a model scales that know nothing of it: keys are mixed only, and each token's own range does the rest."""
    from kv_cache.rotary import Rotary
    from kv_cache.scales import KVScales, LayerScales
    from kv_cache.transforms import mixing

    transform = mixing(head_dim).float().bfloat16().float().expand(kv_heads, head_dim, head_dim).contiguous()
    inverse = torch.linalg.inv(transform.double()).float()
    nothing = torch.zeros(kv_heads, head_dim)
    rotary = Rotary.over(head_dim, 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim), 2048)
    layer = LayerScales(nothing, nothing, transform, inverse, torch.ones(kv_heads), nothing, rotary)
    KVScales([layer] * layers, bits).save(model)
    return model


def write_gpt_oss(folder, window=128):
    """Write a small random gpt-oss, and scales: the real one's values where they are not sizes.

    Sinks take much of the weight. All experts are chosen: small differences would choose others, which hides the rest.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    yarn = {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 128,
    }  # fmt: skip
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=1, head_dim=64, num_local_experts=4, num_experts_per_tok=4, sliding_window=window,
        max_position_embeddings=4096, initializer_range=0.08, rope_parameters=yarn,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=3.0, std=2.0)
        layer.self_attn.q_proj.weight.data *= 0.5  # Else few tokens would have all of the weight.
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=2.0)  # Centres of keys that count.
    model.bfloat16().save_pretrained(folder)
    return write_scales(folder, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


def write_model(folder, head_dim=64, heads=4, kv_heads=2, layers=2, window=None, seed=0, soft_cap=None):
    """Write a random decoder, and scales. Its weights are large: a wrong attention shows in log-probabilities."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 2048,
        "initializer_range": 0.08,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if soft_cap is not None:
        gemma = {"attn_logit_softcapping": soft_cap, "sliding_window": 100, "query_pre_attn_scalar": head_dim}
        model = Gemma2ForCausalLM(Gemma2Config(**shape, **gemma))
    elif window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = MistralForCausalLM(MistralConfig(sliding_window=window, **shape))
    model.float().save_pretrained(folder)
    return write_scales(folder, layers, kv_heads, head_dim)
