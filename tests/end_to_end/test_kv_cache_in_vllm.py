"""The quantized KV cache through vLLM's own scheduler, block manager and paged attention, on CPU."""

import pytest
import torch

from kv_cache.formats import FORMATS
from tests.end_to_end.engines import (
    VOCABULARY,
    engine,
    kv_caches,
    prompts,
    run,
    scheduler,
    write_model,
    write_scales,
)

pytestmark = pytest.mark.engine


def worst_difference(a, b, steps=None):
    """Largest difference of log-probabilities over the steps at which both still have the same tokens before them."""
    worst = 0.0
    for (ids_a, logprobs_a), (ids_b, logprobs_b) in zip(a, b, strict=True):
        for i, (x, y) in enumerate(zip(logprobs_a, logprobs_b, strict=True)):
            if ids_a[:i] != ids_b[:i] or (steps and i >= steps):
                break
            if ids_a[i] == ids_b[i]:
                worst = max(worst, abs(x - y))
    return worst


def count_preemptions(of):
    """Return a list to which the scheduler adds every request that it preempts."""
    preempted, original = [], of._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    of._preempt_request = preempt
    return preempted


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_hold_packed_codes(tmp_path, head_dim):
    """vLLM itself reports the tokens that the same memory holds."""
    model = write_model(tmp_path / "model", head_dim=head_dim)
    tokens = {}
    for name in ("auto", *FORMATS):
        with engine(model, name, dtype="bfloat16", skip_tokenizer_init=True) as llm:
            tokens[name] = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
            pages = next(iter(kv_caches(llm).values()))
            if name != "auto":
                assert pages.dtype == torch.uint8
                assert pages.shape[3] == FORMATS[name].bytes_per_token(head_dim)
    for name, fmt in FORMATS.items():
        assert tokens[name] / tokens["auto"] == pytest.approx(fmt.compression_ratio(head_dim), rel=0.01)


@pytest.mark.serves("bits of its own for each layer (`mixed_per_head`)")
def test_layers_have_the_bits_that_the_checkpoint_names(tmp_path):
    """mixed_per_head: every layer's pages are as wide as its bits, and the same memory holds what they add up to."""
    model, bits = write_model(tmp_path / "model", head_dim=64, layers=3), [(8, 6), (4, 3), (2, 8)]
    text = prompts(2, 150, seed=7, vocabulary=VOCABULARY)
    settings = {"skip_tokenizer_init": True, "max_num_batched_tokens": 128}
    with engine(model, "auto", **settings) as llm:
        plain, room = run(llm, text, 8), llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    write_scales(model, 3, 2, 64, [(8, 8)] * 3)
    with engine(model, "mixed_per_head", **settings) as llm:
        eight = run(llm, text, 8)
    assert worst_difference(eight, plain) < 0.08
    write_scales(model, 3, 2, 64, bits)
    with engine(model, "mixed_per_head", **settings) as llm:
        widths = [pages.shape[3] for pages in kv_caches(llm).values()]
        assert widths == [64 * sum(pair) // 8 + 4 for pair in bits]
        tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        assert tokens / room == pytest.approx(3 * 2 * 64 * 4 / sum(widths), rel=0.01)
        assert worst_difference(run(llm, text, 8), plain, steps=1) < 1.0


def test_mixed_layers_without_bits_are_refused_with_the_command(tmp_path):
    model = write_model(tmp_path / "model")
    with pytest.raises(Exception, match="--kv-budget"), engine(model, "mixed_per_head", skip_tokenizer_init=True):
        pass


@pytest.mark.serves("sliding windows")
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window"),
    [(64, 4, 4, None), (80, 6, 2, None), (96, 4, 1, 48), (128, 4, 2, None), (256, 2, 1, None), (64, 8, 2, 100)],
)
def test_models_of_every_shape(tmp_path, head_dim, heads, kv_heads, window):
    """8-bit codes change log-probabilities little; a wrong head, window, plane or position changes them a lot."""
    model = write_model(tmp_path / "model", head_dim, heads, kv_heads, window=window)
    texts = [p[:n] for p, n in zip(prompts(4, 300, vocabulary=VOCABULARY), (1, 33, 129, 300), strict=True)]
    results = {}
    for name in ("auto", "int8_per_head"):
        with engine(model, name, skip_tokenizer_init=True, max_num_batched_tokens=128) as llm:
            results[name] = run(llm, texts, 16)
    assert worst_difference(results["auto"], results["int8_per_head"]) < 0.08


@pytest.mark.serves("soft caps")
def test_soft_cap(tmp_path):
    model = write_model(tmp_path / "model", soft_cap=1.0)
    texts = prompts(3, 150, vocabulary=VOCABULARY)
    results = {}
    for name in ("auto", "int8_per_head"):
        with engine(model, name, skip_tokenizer_init=True, max_num_batched_tokens=128) as llm:
            results[name] = run(llm, texts, 16)
    assert worst_difference(results["auto"], results["int8_per_head"]) < 0.08


@pytest.mark.serves("chunked prefill, preemption, mixed batches")
def test_scheduling_does_not_change_a_token(ref_7m):
    """Chunked prefill, prefix-cache hits, mixed batches, preemption and recomputation: the same tokens, the same bits.

    Each way of scheduling is compared with every request run alone in one piece.
    """
    texts = [p[:n] for p, n in zip(prompts(5, 200, seed=3), (40, 200, 120, 77, 160), strict=True)]
    common = {"kv_cache_dtype": "int4_per_head", "block_size": 32, "max_model_len": 320}
    with engine(ref_7m, enable_prefix_caching=True, max_num_seqs=4, **common) as llm:
        alone = [run(llm, [text], 60)[0] for text in texts]
        assert run(llm, texts, 60) == alone  # whole blocks come from the prefix cache now, and the batch is mixed
    with engine(ref_7m, enable_prefix_caching=False, max_num_batched_tokens=64, max_num_seqs=4, **common) as llm:
        assert run(llm, texts, 60) == alone  # prompts in chunks of at most 64 tokens beside decoding requests
    with engine(ref_7m, num_gpu_blocks_override=14, max_num_seqs=4, **common) as llm:
        preempted = []
        original = scheduler(llm)._preempt_request
        scheduler(llm)._preempt_request = lambda request, *a, **k: (
            preempted.append(request),
            original(request, *a, **k),
        )
        assert run(llm, texts, 60) == alone
        assert preempted, "the cache was large enough: the test tested nothing"


@pytest.mark.serves("prefix caching")
def test_prefix_cache_hits_read_codes(ref_7m):
    """A hit reads the pages of the earlier request: damage to them must show, and only in requests that hit."""
    text, other = prompts(2, 256, seed=5)
    with engine(ref_7m, "int4_per_head", block_size=32) as llm:
        first = run(llm, [text], 8)
        assert run(llm, [text], 8) == first
        for pages in kv_caches(llm).values():
            pages.bitwise_xor_(0x88)  # flips the top bit of every 4-bit code
        damaged = run(llm, [text], 8)
        assert damaged[0][0] != first[0][0] or worst_difference(damaged, first) > 0.1
        fresh = run(llm, [other], 8)
    with engine(ref_7m, "int4_per_head", block_size=32) as llm:
        assert run(llm, [other], 8) == fresh


@pytest.mark.serves("`--kv-cache-dtype-skip-layers`")
def test_skipped_layers_keep_their_dtype(ref_7m):
    """--kv-cache-dtype-skip-layers: the named layers' pages hold the model's own dtype, the others hold codes."""
    text = prompts(2, 150, seed=7)
    with engine(ref_7m, "int4_per_head", kv_cache_dtype_skip_layers=["0", "5"], dtype="bfloat16") as llm:
        dtypes = [pages.dtype for pages in kv_caches(llm).values()]
        assert dtypes == [torch.bfloat16, *[torch.uint8] * 4, torch.bfloat16]
        skipping = run(llm, text, 8)
    with engine(ref_7m, "auto", kv_cache_dtype_skip_layers=["0", "1", "2", "3", "4", "5"], dtype="bfloat16") as llm:
        plain = run(llm, text, 8)
    assert worst_difference(skipping, plain, steps=1) < 1.0


@pytest.mark.parametrize("dtype", ["int8_per_head", "int6_per_head", "int4_per_head", "int3_per_head"])
def test_calibrated_formats_stay_close_to_the_plain_cache(ref_7m, dtype):
    text = prompts(3, 200, seed=11)
    with engine(ref_7m, "auto") as llm:
        plain = run(llm, text, 12)
    with engine(ref_7m, dtype) as llm:
        coded = run(llm, text, 12)
    assert coded != plain
    assert worst_difference(coded, plain, steps=4) < (0.5 if dtype in ("int8_per_head", "int6_per_head") else 1.2)
