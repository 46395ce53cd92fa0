"""gpt-oss through vLLM's own scheduler on CPU: attention sinks, windows in every other layer, YaRN, experts."""

import pytest
import torch

from tests.end_to_end.engines import VOCABULARY, engine, kv_caches, prompts, run, runner, scheduler, write_gpt_oss
from tests.end_to_end.test_kv_cache_in_vllm import count_preemptions

pytestmark = pytest.mark.engine
NOTHING = -1e4
"""A sink of no weight."""


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A random gpt-oss with scales of its own, by a pass of transformers' model."""
    from transformers import AutoModelForCausalLM

    from kv_cache.calibration import KVCalibrator
    from quant_methods.calibration.kv_observer import ATTENTION, kv_shapes, observing

    folder = write_gpt_oss(tmp_path_factory.mktemp("models") / "gpt-oss")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)
    calibrator = KVCalibrator(kv_shapes(model.model, model.config))
    with torch.no_grad(), observing(calibrator):
        model.model(torch.tensor(prompts(4, 300, vocabulary=VOCABULARY)), use_cache=False)
        model.model(torch.arange(2, 258)[:, None], use_cache=False)
    calibrator.finish().save(folder)
    return folder


def attention_layers(llm):
    return [layer.attn for layer in runner(llm).model.model.layers]


def prompt_logprobs(llm, texts):
    """The log-probabilities of all tokens of some texts but their first ones, float32."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    rows = [zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True) for o in outputs]
    return torch.tensor([found[token].logprob for row in rows for found, token in row])


def with_and_without_sinks(llm, texts):
    found = [prompt_logprobs(llm, texts)]
    for layer in attention_layers(llm):
        layer.sinks.data.fill_(NOTHING)
        layer.attn.process_weights_after_loading(torch.bfloat16)
    return [*found, prompt_logprobs(llm, texts)]


@pytest.mark.serves("attention sinks (gpt-oss)")
def test_codes_change_little_and_sinks_much(gpt_oss):
    texts = [p[:n] for p, n in zip(prompts(4, 500, seed=21, vocabulary=VOCABULARY), (2, 40, 300, 500), strict=True)]
    results = {}
    for name in ("auto", "int8_per_head", "int4_per_head"):
        settings = {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_num_batched_tokens": 128}
        with engine(gpt_oss, name, **settings) as llm:
            dtypes = {pages.dtype for pages in kv_caches(llm).values()}
            assert dtypes == {torch.bfloat16 if name == "auto" else torch.uint8}
            windows = [layer.attn.impl.window for layer in attention_layers(llm)] if name != "auto" else None
            assert windows in (None, [128, 0, 128, 0])
            results[name] = with_and_without_sinks(llm, texts)
    plain, without = results["auto"]
    for name, limit in (("int8_per_head", 0.03), ("int4_per_head", 0.2)):
        coded, coded_without = results[name]
        print(name, [float((x - plain).abs().mean()) for x in (coded, coded_without)])
        assert (coded - plain).abs().mean() < limit
        assert (coded_without - without).abs().mean() < limit
        assert (coded_without - plain).abs().mean() > 0.3


@pytest.mark.long
def test_scheduling_does_not_change_a_token(gpt_oss):
    """Chunked prefill, prefix-cache hits, mixed batches, preemption and recomputation, windows and sinks among them."""
    texts = [
        p[:n] for p, n in zip(prompts(5, 200, seed=3, vocabulary=VOCABULARY), (40, 200, 120, 77, 160), strict=True)
    ]
    common = {
        "kv_cache_dtype": "int4_per_head", "block_size": 32, "max_model_len": 256, "max_num_seqs": 4,
        "skip_tokenizer_init": True,
    }  # fmt: skip
    with engine(gpt_oss, enable_prefix_caching=True, **common) as llm:
        alone = [run(llm, [text], 40)[0] for text in texts]
        assert run(llm, texts, 40) == alone  # whole blocks come from the prefix cache now, and the batch is mixed
    with engine(gpt_oss, enable_prefix_caching=False, max_num_batched_tokens=64, **common) as llm:
        assert run(llm, texts, 40) == alone  # prompts in chunks of at most 64 tokens beside decoding requests
    with engine(gpt_oss, num_gpu_blocks_override=26, **common) as llm:
        preempted = count_preemptions(scheduler(llm))
        assert run(llm, texts, 40) == alone
        assert preempted, "the cache was large enough: the test tested nothing"
