"""Where pages of the KV cache may go. No engine is started."""

from types import SimpleNamespace

import pytest
import torch

from kv_cache.errors import ParetoError
from tests.vllm_ext.fake_engines import some_scales
from vllm_ext.names import SCALES_KEY

pytest.importorskip("vllm")


def transferring(connector, module_path=None, world_size=1, **extra):
    transfer = SimpleNamespace(
        kv_connector=connector, kv_connector_module_path=module_path, kv_connector_extra_config=extra
    )
    return SimpleNamespace(kv_transfer_config=transfer, parallel_config=SimpleNamespace(world_size=world_size))


@pytest.mark.parametrize(
    ("config", "cuda", "message"),
    [
        (transferring("NixlConnector"), True, "does not serve KV transfer by NixlConnector"),
        (transferring("MultiConnector"), True, "does not serve KV transfer by MultiConnector"),
        (transferring("ExampleConnector", "elsewhere"), False, "does not compare the scales of the two sides"),
        (transferring("ExampleConnector", world_size=2), False, "use one rank"),
        (transferring("OffloadingConnector"), False, "give the cache more memory"),
        (transferring("OffloadingConnector", spec_name="TieringOffloadingSpec"), True, "leave spec_name"),
        (transferring("OffloadingConnector", canonical_layout=True), True, "leave spec_name and canonical_layout"),
        (transferring("OffloadingConnector", cpu_bytes_to_use=1), True, None),
        (transferring("ExampleConnector", world_size=1), False, None),
        (transferring(None), False, None),
    ],
)
def test_pages_go_only_where_scales_are_equal(config, cuda, message, monkeypatch):
    import vllm.platforms

    from vllm_ext.transfer import check_transfer

    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cuda=lambda: cuda))
    if message is None:
        check_transfer(config, "int4_per_head")
        return
    with pytest.raises(ParetoError, match=message):
        check_transfer(config, "int4_per_head")


def test_the_fingerprint_of_pages_is_that_of_all_that_their_bytes_depend_on(tmp_path):
    from vllm_ext.transfer import fingerprint

    some_scales().save(tmp_path)
    some_scales().save(tmp_path / "other")

    def engine(folder="", **changes):
        values = {"cache_dtype": "int4_per_head", "block_size": 128, "kv_cache_dtype_skip_layers": []} | changes
        return SimpleNamespace(
            cache_config=SimpleNamespace(**values),
            model_config=SimpleNamespace(dtype=torch.bfloat16),
            speculative_config=None,
            additional_config={SCALES_KEY: str(tmp_path / folder)},
        )

    found = {
        fingerprint(engine()), fingerprint(engine("other")), fingerprint(engine(cache_dtype="int3_per_head")),
        fingerprint(engine(block_size=64)), fingerprint(engine(kv_cache_dtype_skip_layers=["0"])),
    }  # fmt: skip
    assert len(found) == 5
    assert fingerprint(engine()) in found
