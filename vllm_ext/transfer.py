"""Which of vLLM's ways to carry pages of the KV cache elsewhere and back serve our dtypes.

A page is bytes that mean something only beside the scales that it was coded with. An engine that keeps its own pages
elsewhere for a while has the same scales when they come back. Engines that hand pages to one another must have equal
scales, and where nothing compares them, pages of others would be read without an error: that is refused. Whatever is
served moves pages whole.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_cache.errors import ParetoError
from kv_cache.layout import LAYOUT
from kv_cache.scales import SCALES_FILE
from vllm_ext.names import DRAFT_SCALES_KEY, SCALES_KEY

if TYPE_CHECKING:
    from vllm_ext.compat import VllmConfig

OFFLOADING = "OffloadingConnector"
"""Keeps pages of a GPU in the host's memory, for the engine itself; what ``--kv-offloading-size`` asks for."""
STORAGE = "ExampleConnector"
"""Keeps pages in a folder that engines share."""
FOLDER = "shared_storage_path"
"""Where that folder is named in ``kv_connector_extra_config``."""


def check_transfer(config: VllmConfig, dtype: str) -> None:
    """Refuse a connector that could mix pages of engines with other scales, or that does not run here.

    Raises:
        ParetoError: one line with what to use instead.

    """
    from vllm_ext.compat import current_platform

    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    name, extra = transfer.kv_connector, transfer.kv_connector_extra_config
    if transfer.kv_connector_module_path or name not in (OFFLOADING, STORAGE):
        raise ParetoError(
            f"--kv-cache-dtype {dtype} does not serve KV transfer by {name}, which does not compare the scales of the "
            f"two sides: use --kv-offloading-size, {STORAGE}, or --kv-cache-dtype auto"
        )
    if name == OFFLOADING:
        if not current_platform.is_cuda():
            raise ParetoError(
                "KV offloading takes pages from a GPU into the host's memory: leave it out here and give the cache "
                "more memory, VLLM_CPU_KVCACHE_SPACE"
            )
        if extra.get("spec_name", "CPUOffloadingSpec") != "CPUOffloadingSpec" or extra.get("canonical_layout"):
            raise ParetoError(
                f"--kv-cache-dtype {dtype} serves KV offloading into the host's memory only, laid out as on the GPU: "
                "leave spec_name and canonical_layout out of kv_connector_extra_config, or use --kv-cache-dtype auto"
            )
    elif config.parallel_config.world_size > 1:
        raise ParetoError(
            f"{STORAGE} keeps one file for each layer, which ranks would write over for one another: use one rank"
        )


def separate_storage(config: VllmConfig) -> None:
    """Let a shared folder have a part for every set of scales and layout of pages, so that no others are found in it.

    Args:
        config: the engine's, with its scales found.

    """
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector != STORAGE:
        return
    extra = transfer.kv_connector_extra_config
    extra[FOLDER] = str(Path(extra.get(FOLDER, "/tmp")) / f"pareto-{fingerprint(config)}")


def fingerprint(config: VllmConfig) -> str:
    """Return a name for all that the bytes of an engine's pages depend on, but for the weights and the tokens."""
    cache, speculative = config.cache_config, config.speculative_config
    digest = hashlib.sha256()
    said: list[Any] = [LAYOUT, cache.cache_dtype, cache.block_size, sorted(cache.kv_cache_dtype_skip_layers or ())]
    said += [str(config.model_config.dtype), speculative and speculative.kv_cache_dtype]
    digest.update(repr(said).encode())
    for key in (SCALES_KEY, DRAFT_SCALES_KEY):
        folder = config.additional_config.get(key)
        digest.update(b"\0" + ((Path(folder) / SCALES_FILE).read_bytes() if folder else b""))
    return digest.hexdigest()[:24]
