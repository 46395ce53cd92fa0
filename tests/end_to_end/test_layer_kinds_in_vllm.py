"""Models whose layers are not all alike, calibrated and served: answers are those of transformers' float32 model.

Layers of two rotary embeddings (Gemma 3), of two head sizes of which one is not served (Gemma 4).
"""

import shutil

import pytest
import torch
import transformers

from kv_cache.formats import FORMATS
from kv_cache.scales import KVScales
from quant_methods.calibration import kv_pass
from quant_methods.calibration.calibrator import Decoder
from tests.end_to_end.engines import REF_7M, engine, kv_caches, prompts

pytestmark = pytest.mark.engine

SLIDING, FULL = "sliding_attention", "full_attention"
SHAPE = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 8192, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    "initializer_range": 0.08, "tie_word_embeddings": True,
}  # fmt: skip
ALTERNATING = {"num_hidden_layers": 4, "layer_types": [SLIDING, SLIDING, FULL, SLIDING], "sliding_window": 96}
MODELS = {
    "Gemma 3": transformers.Gemma3TextConfig(
        **SHAPE, **ALTERNATING, head_dim=64, query_pre_attn_scalar=64,
        rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    "Gemma 4": transformers.Gemma4TextConfig(
        **SHAPE, **ALTERNATING | {"layer_types": [SLIDING, FULL] * 2}, head_dim=256, global_head_dim=512,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=16,
    ),
}  # fmt: skip
UNCODED = {"Gemma 4": {1, 3}}


def write(config, folder):
    """Write a random model and its calibrated scales; return what transformers makes of it, in float32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().float().eval()
    for name, weight in model.named_parameters():
        # Normalized queries of 256 channels would attend to one token each, and the least noise to another one.
        if name.endswith("q_norm.weight") and config.model_type == "gemma4_text":
            weight.data *= 0.05
    model.save_pretrained(folder)
    for path in REF_7M.glob("*token*"):
        shutil.copy(path, folder)
    kv_pass.calibrate(Decoder(folder), folder, torch.tensor(prompts(4, 256, seed=5)), 0).finish().save(folder)
    return model


@pytest.mark.serves("layers of several kinds and head sizes (Gemma 3, Gemma 4, Qwen3-Next)")
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_model(name, tmp_path):
    from vllm import SamplingParams

    model, given = write(MODELS[name], tmp_path), prompts(3, 500)
    with torch.no_grad():
        logits = model(torch.tensor(given)).logits.log_softmax(-1)
    wanted = logits[:, :-1].gather(-1, torch.tensor(given)[:, 1:, None])[..., 0]
    scales, fmt = KVScales.load(tmp_path), FORMATS["int8_per_head"]
    uncoded = UNCODED.get(name, set())
    assert {index for index in range(4) if scales.layers[index] is None} == uncoded
    with engine(tmp_path, fmt.name, max_num_batched_tokens=192, max_num_seqs=2) as llm:
        pages = {int(layer.split(".")[2]): cache for layer, cache in kv_caches(llm).items()}
        for index in range(4):
            if index not in uncoded:
                assert pages[index].dtype == torch.uint8
                assert pages[index].shape[3] == fmt.bytes_per_token(scales.shape(index)[1])
            elif name == "Gemma 4":
                assert pages[index].dtype == torch.float32
        params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in given], params, use_tqdm=False)
    for prompt, output, expected in zip(given, outputs, wanted, strict=True):
        found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        error = (torch.tensor(found) - expected).abs()
        assert error.mean() < 0.02, error.mean()
        assert error[-100:].mean() < 0.03
    assert [output.outputs[0].token_ids[0] for output in outputs] == logits[:, -1].argmax(-1).tolist()
