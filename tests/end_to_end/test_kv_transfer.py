"""Pages that leave an engine and come back, or come to another one, with a quantized KV cache on CPU."""

from types import SimpleNamespace

import pytest
import torch

from kv_cache.scales import KVScales
from tests.end_to_end.engines import VOCABULARY, engine, kv_caches, prompts, run, runner, write_model, write_scales

pytestmark = pytest.mark.engine

BITS = [(4, 3), (8, 8), (3, 6)]
TEXTS = prompts(2, 300, seed=3, vocabulary=VOCABULARY)
# vLLM's example of a connector keeps prompts right only if they are computed in one piece.
SETTINGS = {"skip_tokenizer_init": True, "max_num_batched_tokens": 1024, "enable_prefix_caching": False}


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "model", layers=3)
    return write_scales(tmp_path / "model", 3, 2, 64, BITS)


def answers(model, storage, dtype="mixed_per_head"):
    """Return answers, how many tokens came from the storage, and what the storage holds."""
    transfer = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(storage)},
    }  # fmt: skip
    with engine(model, dtype, kv_transfer_config=transfer, **SETTINGS) as llm:
        found = run(llm, TEXTS, 24)
        (hits,) = [m.value for m in llm.get_metrics() if m.name == "vllm:external_prefix_cache_hits"]
    return found, hits, sorted(path.name for path in storage.iterdir())


@pytest.mark.serves("KV transfer by a shared folder (ExampleConnector)")
def test_a_shared_folder_serves_engines_with_equal_scales_only(model, tmp_path):
    storage = tmp_path / "storage"
    storage.mkdir()
    with engine(model, "mixed_per_head", **SETTINGS) as llm:
        alone = run(llm, TEXTS, 24)
    found, hits, (folder,) = answers(model, storage)
    assert (found, hits) == (alone, 0)
    found, hits, folders = answers(model, storage)
    # Two blocks of 128 tokens of each prompt were read, and the same tokens follow.
    assert (hits, folders) == (512, [folder])
    assert [ids for ids, _ in found] == [ids for ids, _ in alone]
    scales = KVScales.load(model)
    scales.layers[1].value_size.mul_(1.001)
    scales.save(model)
    _, hits, folders = answers(model, storage)
    assert hits == 0
    assert folder in folders
    assert len(folders) == 2


def test_offloading_moves_pages_whole(model):
    """What vLLM's offloading, which needs a GPU, would move of this engine's pages is each page, byte for byte."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker

    moved = []
    spec = SimpleNamespace(replicated_layout=False, get_worker=moved.append)
    with engine(model, "mixed_per_head", **SETTINGS, num_gpu_blocks_override=16) as llm:
        run(llm, TEXTS, 2)
        pages = kv_caches(llm)
        of = runner(llm)
        OffloadingConnectorWorker(spec, of.vllm_config, of.kv_cache_config).register_kv_caches(pages)
        (regions,) = moved
        assert len(regions.tensors) == len(pages) == 3
        (refs,) = regions.group_data_refs
        for ref, page in zip(refs, pages.values(), strict=True):
            region = regions.tensors[ref.tensor_idx]
            assert ref.page_size_bytes == region.page_size_bytes == page[0].numel()
            assert region.tensor.stride(0) == page.stride(0)
            assert torch.equal(region.tensor.view(torch.uint8), page.reshape(len(page), -1))
            assert region.tensor.any()
