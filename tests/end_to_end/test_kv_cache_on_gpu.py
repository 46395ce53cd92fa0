"""The quantized KV cache through vLLM's Model Runner V2 on a GPU: what scheduling, graphs and compilation may change.

A prompt's piece attends to itself in full precision there, so how a prompt is cut changes answers by as much as the
codes do, and no more.
"""

import pytest
import torch

from tests.end_to_end.engines import (
    VOCABULARY,
    engine,
    kv_caches,
    prompts,
    run,
    scheduler,
    write_gpt_oss,
    write_model,
    write_scales,
)
from tests.end_to_end.test_kv_cache_in_vllm import count_preemptions, worst_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = {"dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.05}


def plain_and_coded(model, name, texts, tokens, **settings):
    results = []
    for dtype in ("auto", name):
        with engine(model, dtype, **(SMALL | settings)) as llm:
            results.append(run(llm, texts, tokens))
    return results


@pytest.mark.serves("sliding windows")
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window"),
    [(64, 4, 4, None), (96, 4, 1, 48), (128, 4, 2, None), (256, 2, 1, None), (64, 8, 2, 100)],
)
def test_models_of_every_shape(tmp_path, head_dim, heads, kv_heads, window):
    model = write_model(tmp_path / "model", head_dim, heads, kv_heads, window=window)
    texts = [p[:n] for p, n in zip(prompts(4, 300, vocabulary=VOCABULARY), (1, 33, 129, 300), strict=True)]
    plain, coded = plain_and_coded(
        model, "int8_per_head", texts, 16, skip_tokenizer_init=True, max_num_batched_tokens=128
    )
    assert worst_difference(plain, coded, steps=8) < 0.15


@pytest.mark.serves("compiled models and full CUDA graphs")
@pytest.mark.parametrize(
    ("name", "eager"),
    [
        ("int8_per_head", True), ("int6_per_head", True), ("k4v3_per_head", True), ("int4_per_head", True),
        ("int3_per_head", True), ("int4_per_head", False), ("int3_per_head", False),
    ],
)  # fmt: skip
def test_formats_stay_close_to_the_plain_cache(ref_7m, name, eager):
    """Without ``eager``, with inductor and full CUDA graphs, as ``vllm serve`` does by itself."""
    texts = [p[:n] for p, n in zip(prompts(5, 700, seed=11), (700, 33, 129, 1, 300), strict=True)]
    plain, coded = plain_and_coded(ref_7m, name, texts, 24, enforce_eager=eager, max_num_batched_tokens=256)
    assert coded != plain
    assert worst_difference(plain, coded, steps=4) < (0.3 if name in ("int8_per_head", "int6_per_head") else 1.2)


@pytest.mark.serves("bits of its own for each layer (`mixed_per_head`)")
def test_layers_have_the_bits_that_the_checkpoint_names(tmp_path):
    """With graphs: each kind of layer has kernels and metadata of its own."""
    model = write_model(tmp_path / "model", 128, 4, 2, layers=3)
    write_scales(model, 3, 2, 128, [(8, 8), (6, 8), (8, 6)])
    texts = [p[:n] for p, n in zip(prompts(4, 300, vocabulary=VOCABULARY), (1, 33, 129, 300), strict=True)]
    plain, coded = plain_and_coded(
        model, "mixed_per_head", texts, 16, skip_tokenizer_init=True, max_num_batched_tokens=128, enforce_eager=False
    )
    assert worst_difference(plain, coded, steps=8) < 0.2


@pytest.mark.serves("soft caps")
def test_soft_cap(tmp_path):
    model = write_model(tmp_path / "model", 128, 4, 2, soft_cap=1.0)
    texts = [p[:n] for p, n in zip(prompts(4, 300, vocabulary=VOCABULARY), (1, 33, 129, 300), strict=True)]
    plain, coded = plain_and_coded(
        model, "int8_per_head", texts, 16, skip_tokenizer_init=True, max_num_batched_tokens=128
    )
    assert worst_difference(plain, coded, steps=8) < 0.15


@pytest.mark.serves("attention sinks (gpt-oss)")
@pytest.mark.parametrize("eager", [True, False])
def test_sinks(tmp_path, eager):
    """gpt-oss' shape, with graphs and without; what sinks themselves change is tested on CPU."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs FlashAttention 3")
    model = write_gpt_oss(tmp_path / "model")
    texts = [p[:n] for p, n in zip(prompts(4, 300, vocabulary=VOCABULARY), (1, 33, 129, 300), strict=True)]
    plain, coded = plain_and_coded(
        model, "int8_per_head", texts, 16, skip_tokenizer_init=True, max_num_batched_tokens=128, enforce_eager=eager
    )
    assert worst_difference(plain, coded, steps=8) < 0.15


@pytest.mark.serves("chunked prefill, preemption, mixed batches")
def test_scheduling_changes_no_more_than_rounding(ref_7m):
    texts = [p[:n] for p, n in zip(prompts(5, 200, seed=3), (40, 200, 120, 77, 160), strict=True)]
    common = {"kv_cache_dtype": "int8_per_head", "block_size": 32, "max_model_len": 320} | SMALL
    with engine(ref_7m, enable_prefix_caching=True, max_num_seqs=4, **common) as llm:
        alone = [run(llm, [text], 60)[0] for text in texts]
        assert worst_difference(run(llm, texts, 60), alone, steps=8) < 0.3
    with engine(ref_7m, enable_prefix_caching=False, max_num_batched_tokens=64, max_num_seqs=4, **common) as llm:
        assert worst_difference(run(llm, texts, 60), alone, steps=8) < 0.3
    with engine(ref_7m, num_gpu_blocks_override=14, max_num_seqs=4, **common) as llm:
        preempted = count_preemptions(scheduler(llm))
        assert worst_difference(run(llm, texts, 60), alone, steps=8) < 0.3
        assert preempted, "the cache was large enough: the test tested nothing"


@pytest.mark.serves("prefix caching")
def test_prefix_cache_hits_read_codes(ref_7m):
    text, other = prompts(2, 256, seed=5)
    with engine(ref_7m, "int4_per_head", block_size=32, **SMALL) as llm:
        first, fresh = run(llm, [text], 8), run(llm, [other], 8)
        for pages in kv_caches(llm).values():
            pages.bitwise_xor_(0x88)  # flips the top bit of every 4-bit code
        damaged = run(llm, [text], 8)
        assert damaged[0][0] != first[0][0] or worst_difference(damaged, first) > 0.1
    with engine(ref_7m, "int4_per_head", block_size=32, **SMALL) as llm:
        assert worst_difference(run(llm, [other], 8), fresh) < 0.05


@pytest.mark.serves("prefix caching within a step")
def test_a_prompt_twice_in_one_step(ref_7m):
    """The second request begins with pages that the step itself writes for the first, and has one token to compute."""
    text = prompts(1, 31 * 32 + 1, seed=17)
    with engine(ref_7m, "int4_per_head", block_size=32, max_num_batched_tokens=2048, **SMALL) as llm:
        together, later = run(llm, text * 2, 8), run(llm, text, 8)
    assert worst_difference(together[1:], later) < 0.05


@pytest.mark.serves("`--kv-cache-dtype-skip-layers`")
def test_skipped_layers_keep_their_dtype(ref_7m):
    with engine(ref_7m, "int4_per_head", kv_cache_dtype_skip_layers=["0", "5"], **SMALL) as llm:
        assert [pages.dtype for pages in kv_caches(llm).values()] == [
            torch.bfloat16, *[torch.uint8] * 4, torch.bfloat16,
        ]  # fmt: skip
        run(llm, prompts(2, 150, seed=7), 8)


@pytest.mark.serves("speculative decoding, n-grams")
def test_speculative_tokens_are_verified_over_codes(ref_7m):
    # A text that repeats itself, so that n-gram drafts are often right.
    text = [prompts(1, 40, seed=9)[0] * 6]
    with engine(ref_7m, "int8_per_head", **SMALL) as llm:
        plain = run(llm, text, 24)
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    with engine(ref_7m, "int8_per_head", speculative_config=drafts, **SMALL) as llm:
        drafted = run(llm, text, 24)
    assert worst_difference(plain, drafted, steps=12) < 0.3


@pytest.mark.serves("tensor parallelism")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["int8_per_head", "int4_per_head"])
def test_each_rank_reads_its_own_heads_scales(ref_7m, name):
    texts = [p[:n] for p, n in zip(prompts(3, 400, seed=13), (400, 33, 129), strict=True)]
    results = []
    for ranks in (1, 2):
        with engine(ref_7m, name, tensor_parallel_size=ranks, max_num_batched_tokens=128, **SMALL) as llm:
            results.append(run(llm, texts, 16))
    assert worst_difference(*results, steps=8) < 0.3
