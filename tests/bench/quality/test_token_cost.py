"""The bits of a KV cache are those of its format, whatever the windows' length."""

from types import SimpleNamespace

import pytest
import torch

from bench import engine
from bench.quality.worker_tap import token_cost


def group(spec, *names):
    return SimpleNamespace(layer_names=list(names), kv_cache_spec=spec)


def test_it_is_read_from_the_pages():
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    plain = interface.FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    window = interface.SlidingWindowSpec(
        block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=64
    )
    four = interface.FullAttentionSpec(
        block_size=128, num_kv_heads=2, head_size=64, dtype=torch.uint8, state_content_bytes=68,
        page_size_padded=1 << 16,
    )  # fmt: skip
    mixed = SimpleNamespace(kv_cache_specs={"c": four, "d": plain}, page_size_bytes=0, block_size=128)
    assert token_cost([group(plain, "a", "b")]) == (2 * 512, 2 * 256)
    # Groups of a hybrid model share their memory, and a token lies in the pages of each.
    assert token_cost([group(plain, "a"), group(window, "b")]) == (2 * 512, 2 * 256)
    total, elements = token_cost([group(mixed, "c", "d")])
    assert (total, elements) == (2 * 68 + 512, 2 * 256)
    latent = interface.MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert token_cost([group(latent, "a")]) == (576 * 2, None)


@pytest.mark.parametrize("tokens", [300, 2048])
def test_the_window_does_not_matter(tokens):
    class LLM:
        llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(
            cache_config=SimpleNamespace(kv_cache_size_tokens=1000 // tokens * tokens, block_size=128)
        ))  # fmt: skip

        def collective_rpc(self, method):
            return {"pareto_kv_bytes": [4096, 4096], "pareto_token_cost": [(68.0, 128), (68.0, 128)]}[method]

    found = engine.kv_cache(LLM(), engine.EngineSettings("m", "int4_per_head"))
    assert found.bits_per_element == 4.25
    assert found.bytes_per_token == 136
